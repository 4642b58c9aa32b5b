"""A progress bar for what is done once before training; on a terminal only, so logs stay clean."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from fluxflow_train import preemption

Item = TypeVar("Item")


def progress(items: Iterable[Item], text: str, total: int) -> Iterator[Item]:
    """`items` as they are; a bar on stderr goes along with them and is gone at the end.

    Raises:
        Stopped: a signal came; between two items nothing is lost.
    """
    console = Console(stderr=True)
    for item in track(items, text, total=total, console=console, transient=True, disable=not console.is_terminal):
        preemption.check()
        yield item
