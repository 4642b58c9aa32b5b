"""Shapes that images are trained in, and which image takes which.

M samples of a selection, K buckets. Shapes are (height, width) in pixels.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    height: int
    width: int

    @property
    def aspect(self) -> float:
        """Width by height."""
        return self.width / self.height


@dataclass(frozen=True)
class BucketRule:
    """Which shapes there are: about r^2 pixels for each r of `resolutions`, sides multiples of `step`.

    `max_aspect`: of the longer side to the shorter; 1 gives squares alone. `min_share`: a bucket with a smaller part
    of the images is merged into the nearest other.
    """

    resolutions: tuple[int, ...]
    max_aspect: float = 1.0
    step: int = 8
    min_share: float = 0.01

    def __post_init__(self) -> None:
        if not self.resolutions or any(r < 1 for r in self.resolutions):
            raise ValueError(f"resolutions: got {list(self.resolutions)}, expected at least one above 0")
        if not 1 <= self.max_aspect <= 16:
            raise ValueError(f"bucket_aspect: got {self.max_aspect}, expected 1 to 16")
        if not 1 <= self.step <= min(self.resolutions):
            raise ValueError(f"bucket_step: got {self.step}, expected 1 to the resolution {min(self.resolutions)}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"bucket_share: got {self.min_share}, expected 0 to 1")
        off = [r for r in self.resolutions if r % self.step]
        if off:
            raise ValueError(f"bucket_step: got {self.step}, expected a divisor of the resolution {off[0]}")

    def shapes(self) -> list[list[Shape]]:
        """For each resolution, smallest first, its shapes from upright to wide."""
        return [_shapes(resolution, self.step, self.max_aspect) for resolution in sorted(set(self.resolutions))]


@dataclass(frozen=True)
class Buckets:
    """`shapes` of the K buckets, and `of` each sample the number of its bucket, (M,)."""

    shapes: tuple[Shape, ...]
    of: np.ndarray

    @classmethod
    def square(cls, resolution: int, count: int) -> "Buckets":
        """One bucket for all."""
        return cls((Shape(resolution, resolution),), np.zeros(count, np.uint16))

    @classmethod
    def by_rule(cls, rule: BucketRule, width: np.ndarray, height: np.ndarray, batch_size: int) -> "Buckets":
        """The nearest shape for images of those sizes, rare ones merged.

        A bucket of fewer images than a batch is rare as well: its batches would hold the same image twice.
        """
        choices = rule.shapes()
        shapes = [shape for row in choices for shape in row]
        sizes, which = np.unique(np.stack([width, height]), axis=1, return_inverse=True)
        nearest = np.array([_nearest(w, h, choices) for w, h in sizes.T.tolist()])
        of = nearest[which.ravel()]
        least = max(rule.min_share * len(of), min(batch_size, len(of)))
        kept, goes_to = _merged(shapes, np.bincount(of, minlength=len(shapes)), least)
        return cls(tuple(shapes[k] for k in kept), goes_to[of].astype(np.uint16))

    @property
    def counts(self) -> list[int]:
        """Images of each bucket."""
        return np.bincount(self.of, minlength=len(self.shapes)).tolist()

    @property
    def fingerprint(self) -> str:
        """Hash of the shapes and of which sample has which."""
        shapes = json.dumps([list(shape) for shape in self.shapes]).encode()
        return hashlib.sha256(shapes + self.of.astype("<u2").tobytes()).hexdigest()

    def shape(self, sample: int) -> Shape:
        return self.shapes[self.of[sample]]

    def num_pixels(self) -> int:
        """Of all samples together."""
        return sum(n * shape.height * shape.width for n, shape in zip(self.counts, self.shapes, strict=True))


def _shapes(resolution: int, step: int, max_aspect: float) -> list[Shape]:
    """For every width the height that comes closest to resolution^2 pixels."""
    if max_aspect == 1:
        return [Shape(resolution, resolution)]
    found = set()
    longest = int(resolution * math.sqrt(max_aspect) // step) * step
    for long in range(resolution, longest + 1, step):
        short = max(step, round(resolution**2 / long / step) * step)
        if long <= max_aspect * short:
            found |= {Shape(long, short), Shape(short, long)}
    return sorted(found, key=lambda shape: (shape.aspect, shape))


def _nearest(width: int, height: int, choices: Sequence[Sequence[Shape]]) -> int:
    """The shape of the nearest aspect, of the largest resolution that the image fills without being enlarged."""
    best, first = 0, 0
    for number, row in enumerate(choices):
        away = [abs(math.log(width / height / shape.aspect)) for shape in row]
        at = away.index(min(away))
        if number == 0 or (row[at].width <= width and row[at].height <= height):
            best = first + at
        first += len(row)
    return best


def _merged(shapes: Sequence[Shape], counts: np.ndarray, least: float) -> tuple[list[int], np.ndarray]:
    """The buckets that stay, and for every bucket which of those its images go to."""
    goes_to = np.arange(len(shapes))
    counts = counts.copy()
    kept = [k for k in range(len(shapes)) if counts[k]]
    while len(kept) > 1 and min(counts[kept]) < least:
        rare = min(kept, key=lambda k: (counts[k], k))
        kept.remove(rare)
        to = min(kept, key=lambda k: (_distance(shapes[rare], shapes[k]), k))
        goes_to[goes_to == rare] = to
        counts[to] += counts[rare]
    places = {k: place for place, k in enumerate(kept)}
    return kept, np.array([places.get(k, 0) for k in goes_to.tolist()])


def _distance(one: Shape, other: Shape) -> float:
    """Between two shapes, by aspect and by area alike."""
    area = one.height * one.width / (other.height * other.width)
    return math.hypot(math.log(one.aspect / other.aspect), math.log(area))
