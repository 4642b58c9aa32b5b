"""What an image of one shape on white shows, read back without a network: the measure of `data=shapes` samples.

H pixels a side. Places and radii are parts of the side, as in `data.sources.shapes`. Ink is 255 minus the pixel, so
white is 0; a mask is the part of each pixel that a shape covers, float32 (H, H) in [0, 1].
"""

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from fluxflow_train.data.sources.shapes import COLOURS, KINDS, paint

NONE = "none"
MIN_INK = 48.0  # length in RGB of the ink of an object's pixels; grey, the palest colour, has 199
MIN_AREA = 0.01  # of the image; the smallest shape alone, a star, covers 0.027
MAX_COLOUR_DISTANCE = 60.0  # in RGB; the two nearest colours, orange and yellow, are 75 apart
MAX_UNEXPLAINED = 0.15  # renders blurred by 2 px of 64 reach 0.08, a rectangle of 3 : 2 has 0.2
MAX_RADIUS = 0.35  # the largest shape alone has 0.28
NUM_FITTED = 3  # kinds, those that the first guess favours: the true one is among them
STEPS = (1 / 64, 1 / 128)  # of the search for place and radius
BLUR = 1 / 64  # standard deviation of the softening before masks are compared


Place = tuple[float, float, float]
"""(centre x, centre y, radius)."""


class Detection(NamedTuple):
    """`colour` and `kind` are NONE, and the place NaN, where no single shape explains the picture.

    `unexplained` is the part of the squared ink that the best shape leaves over; 1 where there is none to try.
    """

    colour: str
    kind: str
    x: float
    y: float
    radius: float
    unexplained: float


def detect(image: np.ndarray) -> Detection:
    """The one shape of a uint8 (3, H, H) image.

    The interior of the largest object gives the colour, its area and centre of mass a first guess; of each kind,
    drawn as the source draws it, the place and radius with the least squared error are sought, and the best kind
    wins. The error is that of the whole picture, so a second object or a smear is ink that no shape explains.

    Raises:
        ValueError: another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"image: got {image.dtype} {image.shape}, expected uint8 (3, H, H)")
    ink = 255 - image.astype(np.float32)
    seen = largest_object(np.linalg.norm(ink, axis=0) > MIN_INK)
    if seen.mean() < MIN_AREA:
        return _nothing(1.0)
    colour = np.median(ink[:, interior(seen)], axis=1)
    name, distance = nearest_colour(255 - colour)
    if distance > MAX_COLOUR_DISTANCE:
        return _nothing(1.0)
    target = soften(ink)
    guesses = sorted((_error(target, colour, kind, _guess(kind, seen)), kind) for kind in KINDS)
    fits = [_fit(target, colour, kind, _guess(kind, seen)) for _, kind in guesses[:NUM_FITTED]]
    unexplained, kind, (x, y, radius) = min(fits)
    if unexplained > MAX_UNEXPLAINED:
        return _nothing(unexplained)
    return Detection(name, kind, x, y, radius, unexplained)


def _nothing(unexplained: float) -> Detection:
    return Detection(NONE, NONE, math.nan, math.nan, math.nan, unexplained)


def _guess(kind: str, seen: np.ndarray) -> Place:
    """The `kind` with the centre of mass and the area of the object; every kind has its centre in its middle."""
    rows, columns = np.nonzero(seen)
    radius = math.sqrt(seen.mean() / unit_area(kind))
    return (columns.mean() + 0.5) / len(seen), (rows.mean() + 0.5) / len(seen), min(radius, 0.99 * MAX_RADIUS)


def _error(target: np.ndarray, colour: np.ndarray, kind: str, place: Place) -> float:
    """|target - colour * mask|^2 / |target|^2, both softened."""
    if not (all(0 < centre < 1 for centre in place[:2]) and 0 < place[2] < MAX_RADIUS):
        return math.inf
    drawn = soften(mask(kind, *place, side=target.shape[-1]))
    overlap, area = float(colour @ (target * drawn).sum((1, 2))), float((drawn**2).sum())
    return 1 - (2 * overlap - float(colour @ colour) * area) / float((target**2).sum())


def _fit(target: np.ndarray, colour: np.ndarray, kind: str, start: Place) -> tuple[float, str, Place]:
    """The error, the kind and the place to which single steps in x, y and radius lead from `start`."""
    best, error = start, _error(target, colour, kind, start)
    tried = {start}
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for axis, sign in product(range(3), (-1, 1)):
                x, y, radius = (value + sign * step * (i == axis) for i, value in enumerate(best))
                if (x, y, radius) in tried:
                    continue
                tried.add((x, y, radius))
                other = _error(target, colour, kind, (x, y, radius))
                if other < error:
                    best, error, improved = (x, y, radius), other, True
    return error, kind, best


def mask(kind: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """The mask of one shape as the source draws it."""
    black = COLOURS["black"][0]
    drawn = np.asarray(paint([(("black", kind), x, y, radius)], side), dtype=np.float32)[..., 0]
    return (255 - drawn) / (255 - black)


@lru_cache
def unit_area(kind: str) -> float:
    """Area of `kind` in squared radii."""
    return float(mask(kind, 0.5, 0.5, 0.5, 256).mean()) * 4


def nearest_colour(pixel: np.ndarray) -> tuple[str, float]:
    """Name of the palette's colour nearest in RGB, and its distance."""
    return min(
        ((name, float(np.linalg.norm(pixel - np.array(rgb)))) for name, rgb in COLOURS.items()), key=lambda c: c[1]
    )


def largest_object(seen: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of bool (H, H); all False where nothing is seen."""
    labels = np.where(seen, np.arange(1, seen.size + 1).reshape(seen.shape), 0)
    while True:  # every pixel takes the highest label around it until none changes
        padded = np.pad(labels, 1)
        around = np.maximum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels])
        spread = np.where(seen, around, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return seen & (labels == counts.argmax())


def interior(seen: np.ndarray) -> np.ndarray:
    """`seen` (bool, H, H) without its rim: eroded as long as an eighth of its area remains."""
    kept = seen
    while True:
        padded = np.pad(kept, 1)
        eroded = kept & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        if eroded.sum() < max(1, seen.sum() / 8):
            return kept
        kept = eroded


def soften(planes: np.ndarray) -> np.ndarray:
    """Gaussian blur of (..., H, H), white beyond the border: edges that a decoder blurred then cost little."""
    kernel = _gaussian(planes.shape[-1])
    return kernel @ planes @ kernel


@lru_cache
def _gaussian(side: int) -> np.ndarray:
    """Symmetric (side, side) matrix whose rows are the blur's weights about each pixel."""
    offsets = np.arange(side)[:, None] - np.arange(side)
    width = BLUR * side
    return (np.exp(-0.5 * (offsets / width) ** 2) / (width * math.sqrt(2 * math.pi))).astype(np.float32)
