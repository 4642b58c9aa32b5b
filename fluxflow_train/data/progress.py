"""A progress bar for what is done once before training; on a terminal only, so logs stay clean."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress(items: Iterable[Item], text: str, total: int) -> Iterable[Item]:
    """`items` as they are; a bar on stderr goes along with them and is gone at the end."""
    console = Console(stderr=True)
    return track(items, text, total=total, console=console, transient=True, disable=not console.is_terminal)
