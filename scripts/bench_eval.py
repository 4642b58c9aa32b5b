"""What `evaluate protocol=...` costs beside the sampler and the extractor alone, on the same images.

Bare: pictures drawn by the sampler in the same numbers at once, and their features; nothing is checked or kept. Ours:
all that an evaluation does once the reference is there: pictures watched for NaN, hashed and kept, features stored,
distances with their intervals and yardsticks, report.json, report.html and report.md. One process, in alternation.

    python scripts/bench_eval.py --run FLOW_RUN [--protocol openmoji-test] [--images 256] [--rounds 3] [--json FILE]

`overhead` is the ratio of the medians; `overhead_without_report` that of the drawing and storing alone.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median

import torch
from alternation import machine, timed
from omegaconf import OmegaConf

from fluxflow_train.evaluation.generation import Drawings
from fluxflow_train.evaluation.place import Options, Place
from fluxflow_train.evaluation.protocol import load
from fluxflow_train.generation import Request
from fluxflow_train.ranks import Ranks
from fluxflow_train.reports.build import write_report
from fluxflow_train.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--protocol", default="openmoji-test")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(machine({"torch": torch.__version__}))
    drawings = opened(options.run, options.protocol, options.images)
    drawings.place.reference.ensure(drawings.needs(), drawings.place.ranks)
    seconds: dict[str, list[float]] = {"bare": [], "fill": [], "report": []}
    bare(drawings, 4)  # memory and threads are there before anything is timed
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds["bare"].append(timed(lambda: bare(drawings, options.images)))
            seconds["fill"].append(timed(lambda folder=folder: drawings.fill(Path(folder))))
            seconds["report"].append(timed(lambda folder=folder: conclude(drawings, Path(folder))))
    alone, filled, whole = (
        median(each)
        for each in (
            seconds["bare"],
            seconds["fill"],
            [a + b for a, b in zip(seconds["fill"], seconds["report"], strict=True)],
        )
    )
    result = {
        "images": options.images,
        "steps": drawings.settings[drawings.scales[0]].steps,
        "seconds_bare": round(alone, 3),
        "seconds_evaluation": round(whole, 3),
        "overhead_without_report": round(filled / alone, 3),
        "overhead": round(whole / alone, 3),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def opened(run: Path, protocol: str, num_images: int) -> Drawings:
    model, description = load_model(run)
    root = Path(OmegaConf.load(run / "config.yaml").data.root).expanduser()
    resolution = description["sampler"]["resolution"]
    place = Place(load(protocol), resolution, Options(num_images=num_images), None, None, root, Ranks(0, 1, 0))
    return Drawings(model, description, place, run)  # type: ignore[arg-type]


def bare(drawings: Drawings, num_images: int) -> None:
    """The sampler and the extractor, and nothing else."""
    place, artist = drawings.place, drawings.artist(drawings.scales[0])
    store = place.store(Path("nowhere"), "bare", "")
    for chunk in store.chunks(num_images):
        captions = place.images.captions(chunk)
        requests = [Request(caption, "", number) for number, caption in zip(chunk, captions, strict=True)]
        place.extractor(artist.draw(requests, lambda _: None).to(place.device))


def conclude(drawings: Drawings, folder: Path) -> None:
    write_report(drawings.report(folder, {"command": "bench_eval"}), folder)
    shutil.rmtree(folder / "features")


if __name__ == "__main__":
    main()
