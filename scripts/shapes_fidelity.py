"""Do samples of a run on `data=shapes` show what their prompts ask for?

    python scripts/shapes_fidelity.py run=DIR --json FILE [--num-prompts 200] [--guidance 3] [--steps 30] [--seed 0]

The prompts name held-out combinations of colour and kind (those of the split `test`, never trained on), each in one
of nine places ("a red circle at the top left"). A detector reads every sample; one that shows no single shape counts
as wrong in everything. The same noise is sampled with the null prompt too, whose samples must agree with the prompts
no more often than chance: by colour sum_k p_asked(k) p_detected(k), by kind alike. `detector` is its accuracy, colour
and kind together, on drawings of the same prompts. Beside FILE a PNG shows the first samples, framed green where
colour and kind are right, else red.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fluxflow_train import rng
from fluxflow_train.data.progress import progress
from fluxflow_train.data.sources.shapes import COLUMNS, PLACES, ROWS, Noun, nouns, paint, phrase, where
from fluxflow_train.errors import UserError
from fluxflow_train.files import replacing, write_atomically
from fluxflow_train.generation import Request
from fluxflow_train.metrics.shapes import NONE, Detection, detect
from fluxflow_train.pipeline import Pipeline

PARTS = ("colour", "shape", "both", "place")
SHEET_COLUMNS, SHEET_ROWS, FRAME = 8, 8, 3
RIGHT, WRONG = (44, 160, 44), (214, 39, 40)


class Asked(NamedTuple):
    """What a prompt asks for; the place is (row, column)."""

    noun: Noun
    place: tuple[str, str]

    @property
    def prompt(self) -> str:
        return f"{phrase(self.noun)} {where(self.place)}"


def prompts(num_prompts: int) -> list[Asked]:
    """The combinations of `test` in turn, every colour as often as the others; each goes through the nine places."""
    combinations = nouns("test")
    rounds = [divmod(i, len(combinations)) for i in range(num_prompts)]
    return [Asked(combinations[i], PLACES[(round_ + i) % len(PLACES)]) for round_, i in rounds]


def drawing(asked: Asked, resolution: int, draws: np.random.Generator) -> np.ndarray:
    """A picture of what is asked, uint8 (3, resolution, resolution)."""
    radius = draws.uniform(0.15, 0.28)
    ranges = COLUMNS[asked.place[1]], ROWS[asked.place[0]]
    x, y = (draws.uniform(max(low, radius), min(high, 1 - radius)) for low, high in ranges)
    return np.asarray(paint([(asked.noun, x, y, radius)], resolution)).transpose(2, 0, 1)


def place_of(found: Detection) -> tuple[str, str] | None:
    """The cell (row, column) of the detected centre; cells meet halfway between the source's ranges."""
    if found.kind == NONE:
        return None
    row, column = (
        next(name for name, limit in zip(cells, (*_borders(cells), math.inf), strict=True) if value < limit)
        for value, cells in ((found.y, ROWS), (found.x, COLUMNS))
    )
    return row, column


def _borders(cells: dict[str, tuple[float, float]]) -> Iterator[float]:
    ranges = list(cells.values())
    return ((left[1] + right[0]) / 2 for left, right in pairwise(ranges))


def agreement(asked: Sequence[Asked], found: Sequence[Detection]) -> dict[str, list[bool]]:
    """For each part, whether each sample shows what is asked."""
    pairs = list(zip(asked, found, strict=True))
    colour = [a.noun[0] == f.colour for a, f in pairs]
    shape = [a.noun[1] == f.kind for a, f in pairs]
    place = [a.place == place_of(f) for a, f in pairs]
    return {"colour": colour, "shape": shape, "both": [(f.colour, f.kind) == a.noun for a, f in pairs], "place": place}


def prompted(asked: Sequence[Asked], found: Sequence[Detection]) -> dict[str, Any]:
    """Rate of each part, with its 95 % interval, and the rate of samples without a shape."""
    result: dict[str, Any] = {"nothing": float(np.mean([f.kind == NONE for f in found]))}
    for part, right in agreement(asked, found).items():
        result |= {part: sum(right) / len(right), f"{part}_interval": wilson(sum(right), len(right))}
    return result


def unprompted(asked: Sequence[Asked], null_found: Sequence[Detection]) -> dict[str, Any]:
    """Rates at which samples of the null prompt agree with prompts that they never saw, beside chance.

    `*_chance` is the agreement of independent labels with these marginals, `*_chance_interval` the central 99 % of
    its binomial distribution, `*_null_inside` whether the rate lies within, ends included.
    """
    num, right = len(asked), agreement(asked, null_found)
    labels = {
        "colour": ([a.noun[0] for a in asked], [f.colour for f in null_found]),
        "shape": ([a.noun[1] for a in asked], [f.kind for f in null_found]),
    }
    result: dict[str, Any] = {"nothing_null": float(np.mean([f.kind == NONE for f in null_found]))}
    for part, (wanted, shown) in labels.items():
        of_wanted, of_shown = Counter(wanted), Counter(shown)
        chance = sum(of_wanted[label] * of_shown[label] for label in of_wanted) / num**2
        low, high = binomial_interval(chance, num)
        result |= {
            f"{part}_null": sum(right[part]) / num,
            f"{part}_chance": chance,
            f"{part}_chance_interval": (low / num, high / num),
            f"{part}_null_inside": low <= sum(right[part]) <= high,
        }
    return result


def wilson(right: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion. Source: Wilson 1927."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = right / num, z**2 / num
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    return max(0.0, (rate + spread / 2 - half) / (1 + spread)), min(1.0, (rate + spread / 2 + half) / (1 + spread))


def binomial_interval(p: float, num: int, confidence: float = 0.99) -> tuple[int, int]:
    """The counts of `num` trials of probability `p` where the distribution reaches each tail's part."""
    if p in (0, 1):
        return round(num * p), round(num * p)
    logs = (math.log(math.comb(num, k)) + k * math.log(p) + (num - k) * math.log1p(-p) for k in range(num + 1))
    reached = np.cumsum([math.exp(log) for log in logs])
    tail = (1 - confidence) / 2
    low, high = np.searchsorted(reached, [tail, 1 - tail])
    return int(low), int(high)


def contact_sheet(images: np.ndarray, right: Sequence[bool]) -> Image.Image:
    """The first of uint8 (N, 3, H, H), framed by whether they are `right`."""
    side = images.shape[-1] + 2 * FRAME
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, SHEET_ROWS * side), "white")
    shown = list(zip(images, right, strict=True))[: SHEET_COLUMNS * SHEET_ROWS]
    for number, (image, is_right) in enumerate(shown):
        row, column = divmod(number, SHEET_COLUMNS)
        sheet.paste(RIGHT if is_right else WRONG, (column * side, row * side, (column + 1) * side, (row + 1) * side))
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0)), (column * side + FRAME, row * side + FRAME))
    return sheet


def sampled(
    pipeline: Pipeline, texts: Sequence[str], *, guidance: float, steps: int, seed: int, label: str
) -> np.ndarray:
    """uint8 (N, 3, H, H): one image for each text, from the noise of its number."""
    requests = [Request(text, "", number) for number, text in enumerate(texts)]
    settings = pipeline.settings(seed=seed, guidance=guidance, steps=steps)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        images = pipeline.generate(requests, settings, lambda done, of: bar.update(task, completed=done, total=of))
    return images.numpy()


def read(images: np.ndarray, label: str) -> list[Detection]:
    return [detect(image) for image in progress(images, label, len(images))]


def measure(pipeline: Pipeline, options: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """The figures and the sheet. Raises UserError where the run can't be sampled so."""
    start = time.perf_counter()
    asked = prompts(options.num_prompts)
    shared = {"steps": options.steps, "seed": options.seed}
    texts = [a.prompt for a in asked]
    images = sampled(pipeline, texts, guidance=options.guidance, label="Sampling the prompts", **shared)
    null = sampled(pipeline, [""] * len(asked), guidance=1, label="Sampling the null prompt", **shared)
    draws = (rng.generator(options.seed, "fidelity drawing", number) for number in range(len(asked)))
    drawn = np.stack([drawing(a, images.shape[-1], d) for a, d in zip(asked, draws, strict=True)])
    found = read(images, "Detecting")
    on_drawings = agreement(asked, read(drawn, "Detecting drawings"))["both"]
    result = {
        **prompted(asked, found),
        **unprompted(asked, read(null, "Detecting, null prompt")),
        "detector": sum(on_drawings) / len(asked),
        "detector_interval": wilson(sum(on_drawings), len(asked)),
        "num_prompts": len(asked),
        "guidance": options.guidance,
        **shared,
        "seconds": time.perf_counter() - start,
    }
    return result, contact_sheet(images, agreement(asked, found)["both"])


def table(result: dict[str, Any]) -> str:
    """The figures as text."""

    def percent(rate: float) -> str:
        return f"{100 * rate:.1f} %"

    def interval(name: str) -> str:
        low, high = result[f"{name}_interval"]
        return f"{100 * low:.1f} to {100 * high:.1f} %"

    lines = [f"{result['num_prompts']} prompts, guidance {result['guidance']:g}, {result['steps']} steps"]
    lines += [f"{'':10}{'right':>9}   95 % interval"]
    lines += [f"{part:10}{percent(result[part]):>9}   {interval(part)}" for part in (*PARTS, "detector")]
    lines += ["", f"{'null':10}{'agrees':>9}{'chance':>9}   99 % around chance"]
    for part in ("colour", "shape"):
        rates = "".join(f"{percent(result[f'{part}_{key}']):>9}" for key in ("null", "chance"))
        inside = "inside" if result[f"{part}_null_inside"] else "OUTSIDE"
        lines += [f"{part:10}{rates}   {interval(f'{part}_chance')}, {inside}"]
    lines += [
        "",
        f"no single shape: {percent(result['nothing'])} of samples, {percent(result['nothing_null'])} of null",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="run=DIR", type=run_folder, help="a finished text-to-image run")
    parser.add_argument("--json", type=Path, required=True, help="the figures; the sheet is beside it, .png")
    parser.add_argument("--num-prompts", type=positive, default=200, help="(%(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and drawings (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda ... (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        result, sheet = measure(Pipeline.from_run(options.run, options.device), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_atomically(options.json, (json.dumps(result, indent=2) + "\n").encode())
    with replacing(options.json.with_suffix(".png")) as temporary:
        sheet.save(temporary, format="PNG")
    print(table(result))
    return 0


def run_folder(text: str) -> Path:
    key, _, folder = text.partition("=")
    if key != "run" or not folder:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected run=DIR")
    return Path(folder)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
