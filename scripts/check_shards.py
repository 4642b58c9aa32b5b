"""Check WebDataset shards before training on them: every tar read strictly, every image decoded.

    python scripts/check_shards.py '/data/train-{00000..00099}.tar' /data/val.tar

Prints a table, one row per shard; exit code 1 if anything is damaged, 0 if all is sound. Writes nothing.
"""

import argparse
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluxflow_train.data.check import ShardReport, check_shard
from fluxflow_train.data.images import ImageLimits
from fluxflow_train.data.progress import progress
from fluxflow_train.data.sources.shards import expand_braces
from fluxflow_train.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", nargs="+", help="paths or brace patterns of plain tars")
    parser.add_argument("--max-pixels", type=int, default=ImageLimits().max_pixels, help="of one image (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        paths = [path for pattern in options.shards for path in expand_braces(pattern)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    # Shape limits are a choice of the training's configuration, not damage.
    limits = ImageLimits(max_pixels=options.max_pixels, max_aspect=float("inf"))
    reports = [check_shard(path, limits) for path in progress(paths, "Checking shards", len(paths))]
    _print(reports)
    return 0 if all(report.sound for report in reports) else 1


def _print(reports: list[ShardReport]) -> None:
    table = Table("shard", "samples", "damage", "noted")
    for report in reports:
        damage = [f"{n} x {cause} (first: {report.first[cause]})" for cause, n in report.damaged.items()]
        noted = [f"{n} x {cause}" for cause, n in report.noted.items()]
        found = report.error or "\n".join(damage) or "none"
        table.add_row(escape(report.path), str(report.samples), escape(found), escape("\n".join(noted)))
    # A pipe or a log has no width to fit: lines are left whole there.
    console = Console() if sys.stdout.isatty() else Console(width=300)
    console.print(table)
    samples, damaged = sum(r.samples for r in reports), sum(r.damaged.total() for r in reports)
    unreadable = sum(bool(report.error) for report in reports)
    console.print(f"{len(reports)} shards, {unreadable} unreadable; {samples} samples, {damaged} damaged")


if __name__ == "__main__":
    sys.exit(main())
