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
    "cross": [(90 * arm + angle, length) for arm in range(4) for angle, length in ((-18, 1.0), (18, 1.0), (45, 0.44))],
}
KINDS = ("circle", *POLYGONS)
RELATIONS = ("above", "below", "left of", "right of")
COLUMNS = {"left": (0.0, 0.38), "": (0.42, 0.58), "right": (0.62, 1.0)}  # where the centre lies, in parts of the side
ROWS = {"top": (0.0, 0.38), "": (0.42, 0.58), "bottom": (0.62, 1.0)}
PLACES = tuple((row, column) for row in ROWS for column in COLUMNS)

Noun = tuple[str, str]
"""(colour, kind)."""


def nouns(split: Split) -> list[Noun]:
    """The combinations of colour and kind that `split` shows; no two splits share one.

    `tune` and `test` have one combination of each colour, `train` the other 32, so every colour and every kind is
    learnt, and only their held-out combinations are asked for.
    """
    colours = list(COLOURS)
    held_out: dict[Split, list[Noun]] = {
        "test": [(colour, KINDS[i % len(KINDS)]) for i, colour in enumerate(colours)],
        "tune": [(colour, KINDS[(i + 3) % len(KINDS)]) for i, colour in enumerate(colours)],
    }
    if split in held_out:
        return held_out[split]
    taken = {noun for combinations in held_out.values() for noun in combinations}
    return [(colour, kind) for colour in colours for kind in KINDS if (colour, kind) not in taken]


_VERSION = 2  # of the drawing: raised when the same seed would give other pictures
_OVERSAMPLING = 4


class Shapes:
    """One shape ("a red circle at the top left") or two in relation ("a red circle above a blue square") on white.

    Held-out combinations of colour and kind make the splits (see `nouns`); relations, places and sizes are drawn
    independently. `pair_prob` is the part of images with two shapes.
    """

    def __init__(
        self,
        root: str,
        resolution: int = 64,
        num_train: int = 4000,
        num_tune: int = 400,
        num_test: int = 400,
        pair_prob: float = 0.5,
        seed: int = 0,
    ) -> None:
        self._counts: dict[Split, int] = {"train": num_train, "tune": num_tune, "test": num_test}
        for name, value in {"resolution": resolution, **self._counts}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not 0 <= pair_prob <= 1:
            raise ValueError(f"pair_prob: got {pair_prob}, expected 0 to 1")
        self.resolution = resolution
        self.pair_prob = pair_prob
        self.seed = seed
        counts = "-".join(str(count) for count in self._counts.values())
        name = f"shapes-{_VERSION}-{resolution}px-pairs{pair_prob:g}-seed{seed}-{counts}"
        self.folder = Path(root).expanduser() / name

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
            draws = rng.generator(self.seed, f"shapes {split}", number)
            image, caption = draw(draws, self.resolution, nouns(split), self.pair_prob)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            splits[split].append(Sample(f"{number:08d}", {"png": buffer.getvalue(), "txt": caption.encode()}))
        return {
            "source": "shapes",
            "resolution": self.resolution,
            "seed": self.seed,
            "pair_prob": self.pair_prob,
            "combinations": {split: [list(noun) for noun in nouns(split)] for split in self._counts},
            "licence": "MIT, as the program that drew them",
            "versions": {"drawing": _VERSION, "pillow": version("pillow")},
            "counts": self._counts,
            "shards": write_splits(folder, splits),
        }


def draw(
    draws: np.random.Generator, resolution: int, combinations: list[Noun], pair_prob: float
) -> tuple[Image.Image, str]:
    """One image of `resolution` pixels on white, and its caption. Places and radii are parts of the side."""
    first = _noun(draws, combinations)
    if draws.random() >= pair_prob:
        return _draw_one(draws, resolution, first)
    second = _noun(draws, combinations)
    while second == first:
        second = _noun(draws, combinations)
    relation = RELATIONS[draws.integers(len(RELATIONS))]
    radii = draws.uniform(0.1, 0.22, 2)
    # Along the axis of the relation each keeps to its own half; across it they are free.
    along = draws.uniform([radii[0], 0.5 + radii[1]], [0.5 - radii[0], 1 - radii[1]])
    across = draws.uniform(radii, 1 - radii)
    if relation in ("below", "right of"):
        along = 1 - along
    xs, ys = (across, along) if relation in ("above", "below") else (along, across)
    shapes = [(noun, xs[i], ys[i], radii[i]) for i, noun in enumerate((first, second))]
    return paint(shapes, resolution), f"{phrase(first)} {relation} {phrase(second)}"


def _draw_one(draws: np.random.Generator, resolution: int, noun: Noun) -> tuple[Image.Image, str]:
    """A lone shape in one of the nine places; one caption in five does not say where."""
    place = PLACES[draws.integers(len(PLACES))]
    radius = draws.uniform(0.15, 0.28)
    (y_low, y_high), (x_low, x_high) = ROWS[place[0]], COLUMNS[place[1]]
    x, y = (draws.uniform(max(a, radius), min(b, 1 - radius)) for a, b in ((x_low, x_high), (y_low, y_high)))
    caption = phrase(noun) if draws.random() < 0.2 else f"{phrase(noun)} {where(place)}"
    return paint([(noun, x, y, radius)], resolution), caption


def where(place: tuple[str, str]) -> str:
    """("top", "left") is "at the top left", ("", "") "in the centre"."""
    named = " ".join(word for word in place if word)
    return f"at the {named}" if named else "in the centre"


def _noun(draws: np.random.Generator, combinations: list[Noun]) -> Noun:
    return combinations[draws.integers(len(combinations))]


def phrase(noun: Noun) -> str:
    """("orange", "star") is "an orange star"."""
    colour, kind = noun
    return f"{'an' if colour == 'orange' else 'a'} {colour} {kind}"


def paint(shapes: list[tuple[Noun, float, float, float]], resolution: int) -> Image.Image:
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
