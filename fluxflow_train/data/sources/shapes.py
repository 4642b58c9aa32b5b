"""Captioned coloured shapes, drawn by us: every image a function of (seed, split, index)."""

import io
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxflow_train import rng
from fluxflow_train.data.progress import progress
from fluxflow_train.data.sources import Split
from fluxflow_train.data.writer import Sample, publish, published_shards, write_splits

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 97, 200),
    "yellow": (240, 200, 20),
    "purple": (130, 60, 170),
    "orange": (255, 127, 14),
    "black": (30, 30, 30),
    "grey": (140, 140, 140),
}
# Corners as (angle in degrees, radius); the circle has none.
POLYGONS = {
    "square": [(angle, 1.0) for angle in range(45, 405, 90)],
    "triangle": [(angle, 1.0) for angle in range(-90, 270, 120)],
    "diamond": [(-90, 1.0), (0, 0.65), (90, 1.0), (180, 0.65)],
    "star": [(-90 + 36 * corner, 1.0 if corner % 2 == 0 else 0.4) for corner in range(10)],
}
KINDS = ("circle", *POLYGONS)
RELATIONS = ("above", "below", "left of", "right of")

_VERSION = 1  # of the drawing: raised when the same seed would give other pictures
_OVERSAMPLING = 4


class Shapes:
    """One shape ("a red circle") or two in relation ("a red circle above a blue square") on white.

    Colours, kinds, relations, places and sizes are drawn independently, so the splits differ in images and share
    captions.
    """

    def __init__(
        self,
        root: str,
        resolution: int = 64,
        num_train: int = 4000,
        num_tune: int = 400,
        num_test: int = 400,
        seed: int = 0,
    ) -> None:
        self._counts: dict[Split, int] = {"train": num_train, "tune": num_tune, "test": num_test}
        for name, value in {"resolution": resolution, **self._counts}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.resolution = resolution
        self.seed = seed
        counts = "-".join(str(count) for count in self._counts.values())
        self.folder = Path(root).expanduser() / f"shapes-{_VERSION}-{resolution}px-seed{seed}-{counts}"

    def prepare(self) -> None:
        """Draw and write the shards, once. Raises UserError where the folder can't be written."""
        publish(self.folder, self._write)

    def shards(self, split: Split) -> list[str]:
        """Paths of the tars of `split`. Raises UserError before `prepare`."""
        return published_shards(self.folder, split)

    def _write(self, folder: Path) -> dict[str, Any]:
        todo: list[tuple[Split, int]] = [
            (split, number) for split, count in self._counts.items() for number in range(count)
        ]
        splits: dict[Split, list[Sample]] = {split: [] for split in self._counts}
        for split, number in progress(todo, f"Drawing shapes at {self.resolution} px", len(todo)):
            image, caption = draw(rng.generator(self.seed, f"shapes {split}", number), self.resolution)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            splits[split].append(Sample(f"{number:08d}", {"png": buffer.getvalue(), "txt": caption.encode()}))
        return {
            "source": "shapes",
            "resolution": self.resolution,
            "seed": self.seed,
            "licence": "MIT, as the program that drew them",
            "versions": {"drawing": _VERSION, "pillow": version("pillow")},
            "counts": self._counts,
            "shards": write_splits(folder, splits),
        }


Noun = tuple[str, str]
"""(colour, kind)."""


def draw(draws: np.random.Generator, resolution: int) -> tuple[Image.Image, str]:
    """One image of `resolution` pixels on white, and its caption. Places and radii are parts of the side."""
    first = _noun(draws)
    if draws.random() < 0.3:
        radius = draws.uniform(0.15, 0.4)
        x, y = draws.uniform(radius, 1 - radius, 2)
        return _paint([(first, x, y, radius)], resolution), _phrase(first)
    second = _noun(draws)
    while second == first:
        second = _noun(draws)
    relation = RELATIONS[draws.integers(len(RELATIONS))]
    radii = draws.uniform(0.1, 0.22, 2)
    # Along the axis of the relation each keeps to its own half; across it they are free.
    along = draws.uniform([radii[0], 0.5 + radii[1]], [0.5 - radii[0], 1 - radii[1]])
    across = draws.uniform(radii, 1 - radii)
    if relation in ("below", "right of"):
        along = 1 - along
    xs, ys = (across, along) if relation in ("above", "below") else (along, across)
    shapes = [(noun, xs[i], ys[i], radii[i]) for i, noun in enumerate((first, second))]
    return _paint(shapes, resolution), f"{_phrase(first)} {relation} {_phrase(second)}"


def _noun(draws: np.random.Generator) -> Noun:
    colours = list(COLOURS)
    return colours[draws.integers(len(colours))], KINDS[draws.integers(len(KINDS))]


def _phrase(noun: Noun) -> str:
    colour, kind = noun
    return f"{'an' if colour == 'orange' else 'a'} {colour} {kind}"


def _paint(shapes: list[tuple[Noun, float, float, float]], resolution: int) -> Image.Image:
    """Each shape is (noun, centre x, centre y, radius); edges smoothed by averaging a larger drawing."""
    side = _OVERSAMPLING * resolution
    image = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(image)
    for (colour, kind), x, y, radius in shapes:
        if kind == "circle":
            box = (side * (x - radius), side * (y - radius), side * (x + radius), side * (y + radius))
            canvas.ellipse(box, fill=COLOURS[colour])
            continue
        corners = [(math.radians(angle), radius * length) for angle, length in POLYGONS[kind]]
        points = [(side * (x + r * math.cos(angle)), side * (y + r * math.sin(angle))) for angle, r in corners]
        canvas.polygon(points, fill=COLOURS[colour])
    return image.reduce(_OVERSAMPLING)
