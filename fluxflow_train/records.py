"""`metrics.csv`: every logged scalar against the images seen."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fluxflow_train.files import write_atomically

FILE_NAME = "metrics.csv"
CLOCK = "images_seen"


class CSVRecords(Logger):
    """One row per record, one column per scalar, empty where a scalar was not recorded.

    A row is appended as one write; a new column rewrites the file under a temporary name.
    """

    def __init__(self, save_dir: str):
        super().__init__()
        self.path = Path(save_dir) / FILE_NAME
        self.columns, self.rows = read(self.path)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {CLOCK: f"{metrics[CLOCK]:.0f}"} | {k: f"{v:.9g}" for k, v in metrics.items() if k != CLOCK}
        self.rows.append(row)
        new = sorted(set(row) - set(self.columns))
        if new:
            self.columns += new
            self.rewrite()
        else:
            with self.path.open("a", newline="") as file:
                file.write(render(self.columns, [row], header=False))

    def drop_after(self, images_seen: int) -> None:
        """Forget what a resumed run will record again."""
        kept = [row for row in self.rows if int(row[CLOCK]) <= images_seen]
        if len(kept) < len(self.rows):
            self.rows = kept
            self.rewrite()

    def rewrite(self) -> None:
        write_atomically(self.path, render(self.columns, self.rows, header=True).encode())


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a metrics file; a last row that was cut short is left out."""
    if not path.exists():
        return [CLOCK], []
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    columns = lines[0]
    return columns, [
        {k: v for k, v in zip(columns, line, strict=True) if v} for line in lines[1:] if len(line) == len(columns)
    ]


def render(columns: list[str], rows: list[dict[str, str]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
