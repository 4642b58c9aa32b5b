import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from fluxflow_train.errors import UserError
from fluxflow_train.metrics.resize import RESIZERS, resize, tf1
from fluxflow_train.pixels import quantize

SIDE = 299
SIZES = [(64, 64), (256, 256), (96, 133), (512, 301)]


def noise(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def stripes(height: int, width: int) -> Tensor:
    """Black and white: a bicubic filter overshoots both ends."""
    columns = torch.arange(width) // 4 % 2 * 255
    return columns.byte().expand(1, 3, height, width).contiguous()


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def antialiased(image: Tensor, kernel, side: int) -> np.ndarray:
    """A filter as wide as the shrinking demands, on half pixels: two dense matrices in float64."""
    x = image.numpy().astype(np.float64)
    matrices = []
    for size in x.shape[-2:]:
        scale = size / side
        centres = (np.arange(side) + 0.5) * scale
        weights = kernel((np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1))
        matrices.append(weights / weights.sum(axis=1, keepdims=True))
    return matrices[0] @ x @ matrices[1].T


@pytest.mark.parametrize("size", SIZES)
def test_tf1_is_torch_fidelitys(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = interpolate_bilinear_2d_like_tensorflow1x(image.float(), size=(SIDE, SIDE), align_corners=False)
    assert torch.equal(tf1(image.float(), SIDE), expected)
    assert torch.equal(resize(image, SIDE, "tf1").float(), expected.round())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resizer", "kernel"), [("clean", bicubic), ("tm-aa", triangle)])
def test_antialiased_resizers_are_their_filters(size: tuple[int, int], resizer: str, kernel) -> None:
    for image in (noise(*size), stripes(*size)):
        expected = antialiased(image, kernel, SIDE).clip(0, 255)
        error = np.abs(resize(image, SIDE, resizer).numpy() - expected)
        assert error.max() < 0.505  # rounding, and fp32 weights; a value that wrapped would be off by 255


@pytest.mark.parametrize("resizer", RESIZERS)
def test_at_its_size_every_resizer_is_the_identity(resizer: str) -> None:
    image = noise(SIDE, SIDE)
    assert torch.equal(resize(image, SIDE, resizer), image)


def test_on_our_images_every_implementation_is_the_identity() -> None:
    """torch-fidelity's, clean-fid's and torchmetrics' own calls on what we made."""
    image = resize(noise(64, 80), SIDE, "tf1")
    x = image.float()
    fidelity = interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
    torchmetrics = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    channel = Image.fromarray(x[0, 0].numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert torch.equal(fidelity, x) and torch.equal(torchmetrics, x)
    assert np.array_equal(np.asarray(channel), x[0, 0].numpy())


def test_the_resizers_differ() -> None:
    image = noise(400, 400)
    made = [resize(image, SIDE, name).float() for name in RESIZERS]
    assert all((made[i] - made[j]).abs().mean() > 1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_quantisation_clamps_where_torchmetrics_wraps() -> None:
    x = torch.tensor([-1.01, -1.0, 0.0, 1.0, 1.02])  # 1.02 is 1.01 of [0, 1]
    assert quantize(x).tolist() == [0, 0, 128, 255, 255]
    assert torch.tensor(1.01).mul(255).byte().item() == 1


@pytest.mark.parametrize("resizer", RESIZERS)
def test_a_rank_without_images(resizer: str) -> None:
    assert resize(noise(8, 8, batch=0), SIDE, resizer).shape == (0, 3, SIDE, SIDE)


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="no resizer 'bilinear': take one of tf1, clean, tm-aa"):
        resize(noise(8, 8), SIDE, "bilinear")
    for image in (noise(8, 8).float(), noise(8, 8)[0], noise(8, 8)[:, :1]):
        with pytest.raises(ValueError, match="expected uint8"):
            resize(image, SIDE, "tf1")
