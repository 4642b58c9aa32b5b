"""One process at a time in a folder, whoever else was started on the same data."""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxflow_train import preemption

POLL = 0.2  # seconds: a blocking call would not let Python look at signals

log = logging.getLogger(__name__)


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Make `folder` and wait until no other process is in it; the system lets go of it for a process that was killed.

    Yields the lock's own file in the folder.

    Raises:
        OSError: the folder can't be written, or its file system knows no locks.
        Stopped: a signal came while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock", f"preparing {folder}") as path:
        yield path


@contextmanager
def held(path: Path, doing: str = "") -> Iterator[Path]:
    """Wait until no other process holds the lock file `path`; the log says what the other is `doing`, unless empty."""
    with path.open("w") as file:
        if not taken(file):
            if doing:
                log.warning("waiting for the process that is %s", doing)
            while not taken(file):
                preemption.check()
                time.sleep(POLL)
        yield path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether what the file `path` stands for is this process's to do; a killed process's claim is free again."""
    with path.open("w") as file:
        yield taken(file)


def taken(file: object) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True
