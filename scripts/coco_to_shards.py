"""COCO's images and captions as WebDataset shards: exactly the list that a protocol measures on.

    python scripts/coco_to_shards.py images=val2014 annotations=captions_val2014.json protocol=coco2014-val-30k
        [out=DIR] [--originals] [--workers N] [--max-bad 0.001]

Images with a caption are ordered by the sha256 of "evaluation <key>" (the key is the image id in 12 digits), and the
protocol's first `num_images` are taken. An image's captions are ordered by the sha256 of their annotation id, and
evaluations draw from the first. So the list follows from the annotations alone. Its sha256 and that of its captions
are printed, stand in manifest.json, and come again in every report as `reference.list_sha256` and
`samples.prompts_sha256`.

Images are cut and resized to the protocol's resolution as evaluations do it, and kept as PNG; --originals keeps the
files as they are, and evaluations see the same pixels. For an image that can't be used the next of the order is taken:
the list is then another one, which is said. What is left out is counted by cause, and more than the part --max-bad of
it ends the run with exit code 1. Shards written until then are kept: the same command goes on there.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from coco_annotations import RULE, Annotations, Entry, Mark, list_digest, read_annotations
from coco_parts import RECORDS, Form, Job, Part, as_it_is, as_png, write_part
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluxflow_train.data.lock import alone
from fluxflow_train.data.progress import progress
from fluxflow_train.data.writer import MANIFEST, SAMPLES_PER_SHARD
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation import protocol as protocols
from fluxflow_train.evaluation.protocol import OWN, Protocol
from fluxflow_train.files import write_atomically

KEYS = ("images", "annotations", "protocol", "out")
ROOT = os.environ.get("FLUXFLOW_DATA", "~/.cache/fluxflow_train")  # data.root where nothing else is given
LOCK = ".lock"  # of `alone`
PROBE = 100  # images of which at least one must be there before work begins


class Plan(NamedTuple):
    """What is to be made; `wanted` images."""

    protocol: Protocol
    annotations: Annotations
    wanted: int
    images: Path
    form: Form
    out: Path
    workers: int
    max_bad: float

    @property
    def identity(self) -> dict[str, Any]:
        """What the folder is made of."""
        return {
            "source": "coco",
            "annotations_sha256": self.annotations.sha256,
            "rule": RULE,
            "split": self.protocol.split,
            "num_images": self.wanted,
            "form": self.form.name,
        }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="images, annotations, protocol, out")
    parser.add_argument("--originals", action="store_true", help="keep the files, neither cut nor resized")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--max-bad", type=float, default=0.001, help="part that may be left out (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        convert(plan_of(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, BrokenProcessPool) as error:
        print(f"error: {error}: put that right, then the same command goes on from here", file=sys.stderr)
        return 1
    return 0


# ---- the command line ----


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises UserError for whatever is wrong with the command, the protocol or the annotations."""
    if options.workers < 1 or not 0 <= options.max_bad <= 1:
        raise UserError("--workers must be 1 or more, --max-bad from 0 to 1")
    settings = settings_of(options.settings)
    protocol = protocols.load(settings["protocol"])
    if protocol.dataset == OWN or not isinstance(protocol.resolution, int):
        raise UserError(f"protocol {protocol.id} measures on other data: take one of COCO, such as coco2014-val-30k")
    form = Form(f"{protocol.resolution} px", partial(as_png, resolution=protocol.resolution))
    if options.originals:
        form = Form("originals", partial(as_it_is, resolution=protocol.resolution))
    annotations = read_annotations(Path(settings["annotations"]).expanduser())
    return Plan(
        protocol=protocol,
        annotations=annotations,
        wanted=protocol.num_images or len(annotations.entries),
        images=Path(settings["images"]).expanduser(),
        form=form,
        out=Path(settings.get("out", f"{ROOT}/{protocol.dataset}-{protocol.split}")).expanduser(),
        workers=options.workers,
        max_bad=options.max_bad,
    )


def settings_of(given: Sequence[str]) -> dict[str, str]:
    """Raises UserError for what is no setting, one given twice, or one missing."""
    settings: dict[str, str] = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in KEYS or not value or key in settings:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}=...?" if near and near[0] != key else f"give {', '.join(KEYS)}, each once"
            raise UserError(f"{text} is no setting: {hint}")
        settings[key] = value
    for key in KEYS[:-1]:
        if key not in settings:
            raise UserError(f"{key}=... is missing: give images=DIR annotations=FILE protocol=coco2014-val-30k")
    return settings


# ---- the folder ----


def convert(plan: Plan) -> None:
    """Make the folder unless it is there, and say what was met.

    Raises:
        UserError: too much was left out, or too little is there.
    """
    if not is_made(plan):
        refuse_unusable(plan)
        folder = plan.out.with_name(f".{plan.out.name}.partial")
        with alone(folder):
            if not is_made(plan):  # another process may have
                publish(plan, folder, write_parts(plan, folder))
    manifest = json.loads((plan.out / MANIFEST).read_text(encoding="utf-8"))
    print(f"{plan.out}: {manifest['num_images']:,} images, {manifest['form']}, {len(manifest['shards'])} shards")
    print(f"list_sha256     {manifest['list_sha256']}")
    print(f"prompts_sha256  {manifest['prompts_sha256']}")
    if manifest["list_sha256"] != manifest["list_sha256_by_rule"]:
        print(
            f"{manifest['replaced']} images of the list can't be used and were replaced: results don't compare with "
            f"those on the list of the annotations ({manifest['list_sha256_by_rule']})"
        )


def is_made(plan: Plan) -> bool:
    """Raises UserError where the folder holds something else."""
    if not plan.out.exists() or not any(plan.out.iterdir()):
        return False
    remedy = "delete it, or give another out=DIR"
    try:
        manifest = json.loads((plan.out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{plan.out} holds other files, or a damaged {MANIFEST}: {remedy}") from error
    for key, value in plan.identity.items():
        if manifest.get(key) != value:
            raise UserError(f"{plan.out} was made with another {key}: {remedy}")
    return True


def refuse_unusable(plan: Plan) -> None:
    """Raises UserError for annotations or images that are not those of the protocol, before any work."""
    annotations = plan.annotations
    refuse_many(annotations.left_out, annotations.num_rows, "rows of the annotations", [], plan.max_bad)
    entries = annotations.entries
    if len(entries) < plan.wanted:
        raise UserError(
            f"protocol {plan.protocol.id} is of {plan.wanted:,} images, and the annotations have {len(entries):,} with "
            "a caption: give the annotations of that split"
        )
    if not any((plan.images / entry.file_name).is_file() for entry in entries[:PROBE]):
        raise UserError(f"images={plan.images} has no {entries[0].file_name} nor its like: give the folder of them")


def refuse_many(left_out: list[Mark], count: int, what: str, noted: list[Mark], max_bad: float) -> None:
    """Raises UserError, below a table of them, where more than the part `max_bad` of `count` was left out."""
    if len(left_out) > max_bad * count:
        show(left_out, noted)
        raise UserError(
            f"{len(left_out):,} of {count:,} {what} can't be used, more than --max-bad={max_bad:g} allows: complete "
            "them, or allow more; what is written so far is kept"
        )


def write_parts(plan: Plan, folder: Path) -> list[Part]:
    """All shards; for images that can't be used one more, of those that follow in the order.

    Raises:
        UserError: too many can't be used, or too few are left.
    """
    entries, wanted = plan.annotations.entries, plan.wanted

    def job(number: int, candidates: list[Entry], limit: int) -> Job:
        return Job(number, candidates, limit, plan.images, plan.form, folder)

    starts = range(0, wanted, SAMPLES_PER_SHARD)
    chunks = [entries[start : min(start + SAMPLES_PER_SHARD, wanted)] for start in starts]
    jobs = [job(number, chunk, len(chunk)) for number, chunk in enumerate(chunks)]
    with ProcessPoolExecutor(plan.workers) as pool:
        try:
            parts = list(progress(pool.map(write_part, jobs), "Writing shards of COCO", len(jobs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    left_out, noted = marks_of(parts)
    refuse_many(left_out, wanted, "images", noted, plan.max_bad)
    if left_out:
        parts.append(write_part(job(len(jobs), entries[wanted:], len(left_out))))
    count = sum(len(part.keys) for part in parts)
    show(plan.annotations.left_out + marks_of(parts)[0], marks_of(parts)[1])
    if count < wanted:
        raise UserError(
            f"protocol {plan.protocol.id} is of {wanted:,} images, and {count:,} can be used: complete "
            f"images={plan.images} and run the same command again"
        )
    return parts


def publish(plan: Plan, folder: Path, parts: list[Part]) -> None:
    """Write the manifest and give the folder its name: until then no reader finds it."""
    rows = [{**part.row, "split": plan.protocol.split} for part in parts if part.row is not None]
    for path in set(folder.glob("*.tar")) - {folder / row["name"] for row in rows}:
        path.unlink()  # of an earlier run that replaced more images
    entries = plan.annotations.entries
    keys = [key for part in parts for key in part.keys]
    first = {entry.key: entry.captions[0] for entry in entries}
    by_rule = [entry.key for entry in entries[: plan.wanted]]
    left_out, noted = marks_of(parts)
    manifest = {
        **plan.identity,
        "list_sha256": list_digest(keys),
        "list_sha256_by_rule": list_digest(by_rule),
        "prompts_sha256": list_digest([first[key] for key in keys]),
        "replaced": len(set(by_rule) - set(keys)),
        "left_out": Counter(mark.cause for mark in plan.annotations.left_out + left_out),
        "noted": Counter(mark.cause for mark in noted),
        "licenses": plan.annotations.licenses,
        "versions": {"pillow": version("pillow")},
        "shards": rows,
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    shutil.rmtree(folder / RECORDS)
    folder.rename(plan.out)
    (plan.out / LOCK).unlink(missing_ok=True)


def marks_of(parts: list[Part]) -> tuple[list[Mark], list[Mark]]:
    """What was left out and what was noted in all."""
    return [mark for part in parts for mark in part.left_out], [mark for part in parts for mark in part.noted]


def show(left_out: list[Mark], noted: list[Mark]) -> None:
    """A table by cause; none where there is nothing to tell."""
    table = Table("left out", "count", "first")
    for marks, words in ((left_out, ""), (noted, "kept: ")):
        first: dict[str, str] = {}
        for mark in marks:
            first.setdefault(mark.cause, mark.where)
        for cause, count in Counter(mark.cause for mark in marks).most_common():
            table.add_row(escape(words + cause), f"{count:,}", escape(first[cause]))
    if table.row_count:
        # A pipe or a log has no width to fit: lines are left whole there.
        (Console() if sys.stdout.isatty() else Console(width=200)).print(table)


if __name__ == "__main__":
    sys.exit(main())
