"""The body of `report`: reports found, held against each other, and printed as a table for pasting."""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.reports import compare as comparison


def compare(cfg: DictConfig) -> None:
    """Print the table, and write it to `cfg.out` where that is given.

    Raises:
        UserError: fewer than two runs, a run without a report, or reports that do not compare.
    """
    if not isinstance(cfg.runs, ListConfig) or len(cfg.runs) < 2:
        raise UserError("a comparison is of two runs or more: runs=[DIR,DIR]")
    names = [str(run) for run in cfg.runs]
    reports = [comparison.find(Path(name).expanduser(), cfg.protocol) for name in names]
    comparison.refuse_unlike(names, reports)
    table = comparison.table(names, reports)
    if cfg.out is not None:
        write_atomically(Path(cfg.out).expanduser(), table.encode())
    print(table, end="")
