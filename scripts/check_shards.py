"""Check WebDataset shards before training on them: every tar read strictly, every image decoded.

    python scripts/check_shards.py '/data/train-{00000..00099}.tar' /data/val.tar [--repair DIR] [--json FILE]

Prints a table of what is wrong. Writes nothing, except with --repair: then all shards go to DIR under their names, with
whole samples only, and a manifest.json. The originals are never touched.

Exit code 0: all is sound; 1: something is damaged; 2: a wrong call, or a place that can't be written.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluxflow_train.data.check import ShardReport, check_shard, repair_shard
from fluxflow_train.data.images import ImageLimits
from fluxflow_train.data.progress import progress
from fluxflow_train.data.sources.shards import expand_braces
from fluxflow_train.data.writer import MANIFEST
from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically

_LISTED = 20  # above, sound shards are only counted


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", nargs="+", help="paths or brace patterns of plain tars")
    parser.add_argument("--max-pixels", type=int, default=ImageLimits().max_pixels, help="of one image (%(default)s)")
    parser.add_argument("--jobs", type=int, default=cpus, help="processes (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    parser.add_argument("--repair", type=Path, metavar="DIR", help="write what is whole there; an empty or new folder")
    options = parser.parse_args(arguments)
    # Shape limits are a choice of the training's configuration, not damage.
    limits = ImageLimits(max_pixels=options.max_pixels, max_aspect=float("inf"))
    try:
        paths = list(dict.fromkeys(path for pattern in options.shards for path in expand_braces(pattern)))
        look: Callable[[str], ShardReport] = partial(check_shard, limits=limits)
        if options.repair is not None:
            _make_empty(options.repair, paths)
            look = partial(repair_shard, folder=options.repair, limits=limits)
        reports = _all(look, paths, options.jobs)
        if options.repair is not None:
            rows = [report.written for report in reports if report.written]
            dropped = {report.path: dict(report.dropped) for report in reports if report.dropped}
            manifest = {"source": "check_shards.py --repair", "shards": rows, "dropped": dropped}
            write_atomically(options.repair / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        if options.json is not None:
            write_atomically(options.json, (json.dumps([vars(r) for r in reports], indent=2) + "\n").encode())
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    _print(reports, repaired=options.repair is not None)
    return 0 if all(report.sound for report in reports) else 1


def _make_empty(folder: Path, paths: list[str]) -> None:
    names = [Path(path).name for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two shards are named {twice}: repair them into different folders")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give an empty or new folder, nothing is ever overwritten")


def _all(look: Callable[[str], ShardReport], paths: list[str], jobs: int) -> list[ShardReport]:
    """The reports in the order of `paths`."""
    if jobs < 2 or len(paths) < 2:
        return [look(path) for path in progress(paths, "Checking shards", len(paths))]
    with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(look, path) for path in paths]
        for _ in progress(as_completed(futures), "Checking shards", len(paths)):
            pass
        return [future.result() for future in futures]


def _print(reports: list[ShardReport], repaired: bool) -> None:
    table = Table("shard", "samples", "damage", "noted", *(["kept", "not kept"] if repaired else []))
    for report in reports:
        if report.sound and len(reports) > _LISTED:
            continue
        damage = [f"{n} x {cause} (first: {report.first[cause]})" for cause, n in report.damaged.items()]
        noted = [f"{n} x {cause}" for cause, n in report.noted.items()]
        found = "\n".join([report.error] * bool(report.error) + damage) or "none"
        row = [report.path, str(report.samples), found, "\n".join(noted)]
        if repaired:
            row += [str(report.written.get("samples", 0)), "\n".join(f"{n} x {c}" for c, n in report.dropped.items())]
        table.add_row(*map(escape, row))
    # A pipe or a log has no width to fit: lines are left whole there.
    console = Console() if sys.stdout.isatty() else Console(width=300)
    if table.row_count:
        console.print(table)
    samples, damaged = sum(r.samples for r in reports), sum(r.damaged.total() for r in reports)
    unreadable = sum(bool(report.error) for report in reports)
    kept = f"; {sum(r.written.get('samples', 0) for r in reports)} samples kept" if repaired else ""
    console.print(f"{len(reports)} shards, {unreadable} unreadable; {samples} samples, {damaged} damaged{kept}")


if __name__ == "__main__":
    sys.exit(main())
