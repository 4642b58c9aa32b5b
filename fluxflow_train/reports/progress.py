"""What an evaluation tells while it runs, and how long each part of it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fluxflow_train import preemption


@contextmanager
def clock(cost: dict[str, float], name: str) -> Iterator[None]:
    """Seconds spent inside, under `name`."""
    started = time.perf_counter()
    yield
    cost[name] = round(time.perf_counter() - started, 2)


@contextmanager
def progress(label: str, total: int) -> Iterator[Any]:
    """A bar on stderr, silent where that is no terminal; yields the function that advances it.

    Raises:
        Stopped: a signal came; what was made so far is kept where it was written.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task: TaskID = bar.add_task(label, total=total)

        def advance(amount: int) -> None:
            preemption.check()
            bar.advance(task, amount)

        yield advance
