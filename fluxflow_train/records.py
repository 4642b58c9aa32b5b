"""Where scalars go, always against the images seen: `metrics.csv`, and W&B on the same axis."""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.run_directory import RunDirectory

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

    @rank_zero_only
    def drop_after(self, images_seen: int) -> None:
        """Forget what a resumed run will record again."""
        self.rows = [row for row in self.rows if int(row[CLOCK]) <= images_seen]
        self.rewrite()

    def rewrite(self) -> None:
        write_atomically(self.path, render(self.columns, self.rows, header=True).encode())


class WandbRecords(WandbLogger):
    """Lightning's W&B logger with `images_seen` as the axis; a run directory that resumes resumes its W&B run.

    The config of the W&B run is the run directory's own, with `labels` beside it.
    """

    def __init__(
        self,
        project: str,
        name: str,
        group: str,
        id: str,
        save_dir: str,
        offline: bool,
        job_type: str,
        tags: Sequence[str],
        labels: Mapping[str, Any],
    ):
        config: Any = OmegaConf.to_container(RunDirectory(Path(save_dir)).config(), resolve=True)
        try:
            super().__init__(
                project=project,
                name=name,
                group=group,
                id=id,
                save_dir=save_dir,
                offline=offline,
                resume="allow",
                job_type=job_type,
                tags=list(tags),
                config={**config, **labels},
            )
        except ModuleNotFoundError as error:
            raise UserError('logger=wandb needs wandb: pip install "fluxflow-train[wandb]"') from error
        import wandb

        if wandb.run is not None and wandb.run.id != id:  # Lightning would write into it
            wandb.finish()
        self._axis_defined = False

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.define_axis()
        self.experiment.log(dict(metrics))

    def define_axis(self) -> None:
        """Every scalar against the images seen: Lightning's own step counts optimizers."""
        if not self._axis_defined:
            self.experiment.define_metric(CLOCK)
            self.experiment.define_metric("*", step_metric=CLOCK)
            self._axis_defined = True


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a metrics file; a last row that was cut short is left out."""
    if not path.exists():
        return [CLOCK], []
    whole, _, _ = path.read_text().rpartition("\n")
    columns, *lines = csv.reader(whole.splitlines())
    return columns, [{k: v for k, v in zip(columns, line, strict=True) if v} for line in lines]


def render(columns: list[str], rows: list[dict[str, str]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
