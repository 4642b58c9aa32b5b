"""One process at a time in a folder, whoever else was started on the same data."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make `folder` and wait until no other process is in it; the system lets go of it for a process that was killed.

    Raises:
        OSError: the folder can't be written, or its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for the process that is preparing %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
