"""The detector of shapes: right on drawings, on blurred and noisy ones too, silent on what is no single shape."""

import numpy as np
import pytest
from scipy import ndimage

from fluxflow_train import rng
from fluxflow_train.data.sources.shapes import COLOURS, KINDS, Noun, draw, nouns, paint
from fluxflow_train.metrics.shapes import NONE, detect, interior, largest_object, mask, soften, unit_area

SIDE = 64


def placed(number: int, side: int = SIDE) -> tuple[Noun, float, float, float, np.ndarray]:
    """Every combination in turn, anywhere whole in the picture, at the sizes of the source."""
    draws = rng.generator(0, "detector test", number)
    noun = (list(COLOURS)[number % 8], KINDS[number // 8 % 6])
    radius = draws.uniform(0.15, 0.28)
    x, y = draws.uniform(radius, 1 - radius, 2)
    return noun, x, y, radius, np.asarray(paint([(noun, x, y, radius)], side)).transpose(2, 0, 1)


def smeared(image: np.ndarray, sigma: float, noise: float, number: int) -> np.ndarray:
    blurred = ndimage.gaussian_filter(image.astype(float), (0, sigma, sigma), mode="nearest")
    noisy = blurred + rng.generator(0, "detector noise", number).normal(0, noise, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def ink_of(colour: str, where: np.ndarray) -> np.ndarray:
    """bool (H, H) filled with a colour, on white."""
    return np.where(where, np.array(COLOURS[colour])[:, None, None], 255).astype(np.uint8)


def test_the_test_splits_drawings_are_read() -> None:
    combinations = nouns("test")
    right = 0
    for number in range(400):
        image, caption = draw(rng.generator(0, "shapes test", number), SIDE, combinations, pair_prob=0)
        found = detect(np.asarray(image).transpose(2, 0, 1))
        right += caption.split()[1:3] == [found.colour, found.kind]
    assert right >= 0.98 * 400


def test_place_and_radius() -> None:
    for number in range(48):
        noun, x, y, radius, image = placed(number)
        found = detect(image)
        assert (found.colour, found.kind) == noun
        assert (found.x, found.y, found.radius) == pytest.approx((x, y, radius), abs=1 / SIDE)
        assert found.unexplained < 0.02


@pytest.mark.parametrize(("sigma", "noise"), [(1.0, 5.0), (1.5, 10.0), (0.01, 15.0)])
def test_blur_and_noise(sigma: float, noise: float) -> None:
    right = 0
    for number in range(96):
        noun, *_, image = placed(number)
        found = detect(smeared(image, sigma, noise, number))
        right += (found.colour, found.kind) == noun
    assert right >= 0.95 * 96


def test_another_resolution() -> None:
    for number in range(0, 48, 5):
        noun, *_, image = placed(number, side=128)
        found = detect(image)
        assert (found.colour, found.kind) == noun


def test_a_speck_beside_the_shape_is_forgiven() -> None:
    image = np.asarray(paint([(("blue", "star"), 0.4, 0.4, 0.25)], SIDE)).transpose(2, 0, 1).copy()
    image[:, 60:62, 60:62] = 0
    found = detect(image)
    assert (found.colour, found.kind) == ("blue", "star")
    assert (found.x, found.y) == pytest.approx((0.4, 0.4), abs=1 / SIDE)


def test_no_single_shape_is_none() -> None:
    draws = rng.generator(0, "no shape")
    rows, columns = np.mgrid[:SIDE, :SIDE]
    waves = ndimage.gaussian_filter(draws.normal(size=(3, SIDE, SIDE)), (0, 6, 6))
    pictures = {
        "blank": ink_of("red", rows < 0),
        "full": ink_of("red", rows >= 0),
        "noise": draws.integers(0, 256, (3, SIDE, SIDE)).astype(np.uint8),
        "waves": np.clip(128 + 128 * waves / waves.std(), 0, 255).astype(np.uint8),
        "gradient": np.stack([4 * columns] * 3).astype(np.uint8),
        "bar": ink_of("red", (abs(rows - 30) < 4) & (abs(columns - 30) < 20)),
        "rectangle": ink_of("red", (abs(rows - 30) < 15) & (abs(columns - 30) < 10)),
        "ring": ink_of("red", abs(np.hypot(rows - 32, columns - 32) - 12) < 4),
        "speck": ink_of("red", (rows < 4) & (columns < 4)),
        "pale": np.where(abs(rows - 32) + abs(columns - 32) < 15, 200, 255) * np.ones((3, 1, 1)),
    }
    pictures["two"] = np.asarray(
        paint([(("red", "circle"), 0.25, 0.5, 0.2), (("red", "circle"), 0.75, 0.5, 0.2)], SIDE)
    ).transpose(2, 0, 1)
    for name, picture in pictures.items():
        found = detect(picture.astype(np.uint8))
        assert (found.colour, found.kind) == (NONE, NONE) and np.isnan(found.x), name


def test_what_is_no_image_is_refused() -> None:
    for wrong in (np.zeros((3, 8, 8)), np.zeros((8, 8, 3), np.uint8), np.zeros((3, 8, 9), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \(3, H, H\)"):
            detect(wrong)


def test_largest_object_is_scipys() -> None:
    for number in range(5):
        seen = rng.generator(0, "islands", number).random((24, 24)) < 0.55
        labels, _ = ndimage.label(seen)
        sizes = np.bincount(labels.ravel())[1:]
        ours = largest_object(seen)
        assert ours.sum() == sizes.max()
        assert len(np.unique(labels[ours])) == 1 and labels[ours][0] != 0
    assert not largest_object(np.zeros((4, 4), bool)).any()


def test_interior_keeps_off_the_rim_and_is_never_empty() -> None:
    whole = mask("circle", 0.5, 0.5, 0.3, SIDE) > 0.5
    assert 0 < interior(whole).sum() < whole.sum() / 3
    assert not (interior(whole) & ~ndimage.binary_erosion(whole)).any()
    line = np.zeros((9, 9), bool)
    line[4] = True
    assert interior(line).any()


def test_soften_is_scipys() -> None:
    image = rng.generator(0, "blur").random((2, SIDE, SIDE)).astype(np.float32)
    expected = ndimage.gaussian_filter(image, (0, 1, 1), mode="constant", truncate=8)
    np.testing.assert_allclose(soften(image), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "area"), [("circle", np.pi), ("square", 2), ("triangle", 3 * 3**0.5 / 4), ("diamond", 1.3)]
)
def test_unit_area(kind: str, area: float) -> None:
    assert unit_area(kind) == pytest.approx(area, rel=0.01)
