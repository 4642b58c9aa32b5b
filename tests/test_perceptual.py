from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxflow_train.errors import UserError
from fluxflow_train.perceptual import LPIPS

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A squeezenet with random weights, in the file that torchvision would have downloaded."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def lpips(weights: Path) -> LPIPS:
    return LPIPS(str(weights), net="squeeze")


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(weights: Path, x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1: normalised features of 7 layers, squared difference, learned weights, mean."""
    import torchmetrics.functional.image.lpips as package

    heads = torch.load(Path(package.__file__).parent / "lpips_models" / "squeeze.pth", "cpu", weights_only=True)
    net = torchvision.models.squeezenet1_1(weights=None)
    net.load_state_dict(torch.load(weights, weights_only=True))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((v - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for v in (x, y))
    total, layer = torch.zeros(len(x)), 0
    for index, module in enumerate(net.features):
        x, y = module(x), module(y)
        if index in (1, 4, 7, 9, 10, 11, 12):
            a, b = (v / (v.square().sum(1, keepdim=True) + 1e-8).sqrt() for v in (x, y))
            total = total + (heads[f"lin{layer}.model.1.weight"] * (a - b).square()).sum(1).mean((1, 2))
            layer += 1
    return total.mean()


def test_distance_by_hand(lpips: LPIPS, weights: Path) -> None:
    with torch.no_grad():
        expected = by_hand(weights, images(0), images(1))
    assert expected > 0
    torch.testing.assert_close(lpips(images(0), images(1)), expected, rtol=1e-4, atol=1e-7)
    assert lpips(images(0), images(0)).item() == 0


def test_gradient_reaches_the_image_and_nothing_else(lpips: LPIPS) -> None:
    x_hat = images(0).requires_grad_()
    lpips.train()(x_hat, images(1)).backward()
    assert x_hat.grad is not None and x_hat.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())
    assert not lpips.network.training


def test_fp32_under_autocast(lpips: LPIPS) -> None:
    expected = lpips(images(0), images(1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lpips(images(0), images(1)), expected, rtol=1e-6, atol=0)


def test_building_it_leaves_the_global_generator_alone(weights: Path) -> None:
    before = torch.get_rng_state()
    LPIPS(str(weights), net="squeeze")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_foreign_and_damaged_files(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no LPIPS backbone at .*vgg16-397923af\.pth"):
        LPIPS(str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="no state dict of torchvision's alex"):
        LPIPS(str(weights), net="alex")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        LPIPS(str(cut), net="squeeze")
