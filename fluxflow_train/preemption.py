"""Being asked to end: signals leave a note, and the work looks at it where stopping loses nothing.

Nothing here may import torch: `listen` must stand in the first lines of a command, since a cluster's signal may come
while the imports take their seconds. A handler that did more than leave a note could meet half a collective.
"""

import os
import signal
import time
from types import FrameType

from fluxflow_train.errors import Stopped

STARTED = time.monotonic()
CLUSTER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*CLUSTER, signal.SIGINT)  # and Ctrl-C

_noted: list[str] = []


def listen(signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
    """From now on these signals leave a note. A second Ctrl-C ends the command at once."""
    for number in signals:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _noted:
        raise KeyboardInterrupt
    if not _noted and os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")) == "0":
        again = " (Ctrl-C again: at once)" if name == "SIGINT" else ""
        os.write(2, f"\n{name}: stopping as soon as all is saved{again}\n".encode())
    _noted.append(name)


def noted() -> str:
    """The first signal that came, by name; "" when none did."""
    return _noted[0] if _noted else ""


def hours_passed() -> float:
    """Since the command began."""
    return (time.monotonic() - STARTED) / 3600


def check() -> None:
    """Raises Stopped where a signal has come: for work that loses nothing when it is cut short here."""
    if _noted:
        raise Stopped(f"stopped by {noted()}: the same command goes on from here")
