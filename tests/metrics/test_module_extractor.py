import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.errors import UserError
from fluxflow_train.metrics.extractor import fixed_images, state_sha256
from fluxflow_train.metrics.module_extractor import ModuleExtractor
from fluxflow_train.metrics.resize import resize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def network(seed: int = 0) -> nn.Module:
    """Batch statistics and dropout: whatever a training mode would change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        made = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(96, 4)
        )
    for parameter in made.parameters():
        parameter.data.normal_(generator=generator)
    return made


def extractor(module: nn.Module | None = None, **changes: Any) -> ModuleExtractor:
    arguments = {"name": "small", "side": 19, "resizer": "clean", "mean": MEAN, "std": STD, **changes}
    return ModuleExtractor(network() if module is None else module, **arguments)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randint(0, 256, (20, 3, 40, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_are_the_modules_on_normalised_pixels(image: Tensor) -> None:
    made = extractor()
    pixels = resize(image, 19, "clean").numpy() / 255
    x = (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    expected = network().eval()(torch.from_numpy(x).float()).detach()
    features = made(image)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert (made.num_features, made.name, made.resizer, made.is_canonical) == (4, "small", "clean", False)
    assert made(image[:0]).shape == (0, 4)


def test_neither_autocast_nor_training_nor_its_batch_changes_features(image: Tensor) -> None:
    made = extractor()
    expected = made(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(image), expected)
    assert torch.equal(made.train()(image), expected)
    torch.testing.assert_close(made(image[3:4]), expected[3:4], rtol=1e-5, atol=1e-5)


def test_no_global_draws(image: Tensor) -> None:
    module = network()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    extractor(module).train()(image)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_modules_run_in_fp32(image: Tensor) -> None:
    assert extractor(network().bfloat16())(image).dtype == torch.float32


def test_the_hash_is_of_names_shapes_and_bytes() -> None:
    state = {"b": torch.tensor(1.0), "a": torch.arange(6).view(2, 3)}
    content = b"a torch.int64 (2, 3)\n" + np.arange(6).tobytes() + b"b torch.float32 ()\n" + np.float32(1).tobytes()
    assert state_sha256(state) == hashlib.sha256(content).hexdigest()
    assert state_sha256(dict(reversed(state.items()))) == state_sha256(state)
    assert state_sha256({**state, "a": torch.arange(6).view(3, 2)}) != state_sha256(state)


def test_weights_that_nobody_vouches_for_count_as_random() -> None:
    unknown = extractor()
    known = extractor(weights_sha256=unknown.weights_sha256)
    assert unknown.is_random and not known.is_random
    changed = network()
    next(changed.parameters()).data.view(-1)[0] += 1
    with pytest.raises(UserError, match="other weights than its weights_sha256"):
        extractor(changed, weights_sha256=unknown.weights_sha256)


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Identity(), r"\(2, 3, 19, 19\)"), (nn.Flatten(0), r"\(2166,\)"), (nn.LSTM(19, 2), "fails on an image")],
)
def test_outputs_of_another_shape_are_refused(module: nn.Module, shape: str) -> None:
    with pytest.raises(UserError, match=shape) as error:
        extractor(module)
    assert "\n" not in str(error.value)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def test_outputs_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(UserError, match="makes tuple of 2 images"):
        extractor(Pair())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 64}, "fails on an image of 64 x 64"),
        ({"name": "FID!"}, "becomes a metric's"),
        ({"resizer": "bilinear"}, "no resizer"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"mean": (0.5,)}, "three numbers each"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        extractor(**changes)
    assert "\n" not in str(error.value)


def test_the_fingerprint_tells_modules_apart() -> None:
    ours, other, none = extractor(), extractor(network(1)), extractor(nn.Flatten())
    assert ours.fingerprint() == extractor().fingerprint() != other.fingerprint()
    assert len(none.fingerprint()) == 8  # a module without weights has no device


def test_the_fixed_images_never_change() -> None:
    ramp = np.arange(8 * 3 * 64 * 64, dtype=np.int64)
    expected = ((ramp * 2654435761) >> 13) & 255
    assert fixed_images().flatten().tolist() == expected.tolist()
    assert fixed_images().shape == (8, 3, 64, 64) and fixed_images().dtype == torch.uint8
