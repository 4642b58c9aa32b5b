"""Checkpoints that a power cut can't spoil: `last.ckpt`, the one before it, and the best so far."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L

from fluxflow_train.files import replacing

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class Checkpoint(L.Callback):
    """Saves every `every_images` images and at the end; after a validation that beat all before it, `best.ckpt` too.

    A file is written to a temporary name, synced and renamed. The former `last.ckpt` stays as `previous.ckpt`, for the
    day that the last one turns out damaged. `monitor` is a validation scalar; the best is its "max" or "min".
    """

    def __init__(self, folder: str, every_images: int, monitor: str, mode: Literal["max", "min"]):
        if mode not in ("max", "min"):
            raise ValueError(f'mode must be "max" or "min", got "{mode}"')
        self.folder = Path(folder)
        self.every_images, self.monitor = every_images, monitor
        self.sign = 1 if mode == "max" else -1
        self.saved_at = 0
        self.best = float("-inf")  # of sign * monitor

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Where a validation follows, the checkpoint waits for it: a resumed run doesn't repeat it.
        between: Any = trainer.val_check_batch
        if self.is_due(pl_module) and (batch_idx + 1) % between:
            self.save(trainer, pl_module.images_seen)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        value = pl_module.latest.get(self.monitor)
        if trainer.sanity_checking or value is None:
            return
        if self.sign * value > self.best:
            self.best = self.sign * value
            self.write(trainer, self.folder / BEST)
        if self.is_due(pl_module):
            self.save(trainer, pl_module.images_seen)

    def is_due(self, pl_module: Any) -> bool:
        return pl_module.images_seen // self.every_images > self.saved_at // self.every_images

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        seen: int = pl_module.images_seen
        if seen > self.saved_at:
            self.save(trainer, seen)

    def save(self, trainer: L.Trainer, images_seen: int) -> None:
        """Move `last.ckpt` to `previous.ckpt` once the new one is safely written beside it."""
        self.saved_at = images_seen
        last = self.folder / LAST
        self.write(trainer, last, before_rename=lambda: last.exists() and os.replace(last, self.folder / PREVIOUS))

    def write(self, trainer: L.Trainer, path: Path, before_rename: Callable[[], object] = lambda: None) -> None:
        """Collective: every rank takes part, the first one writes."""
        if trainer.is_global_zero:
            with replacing(path) as temporary:
                trainer.save_checkpoint(temporary)
                before_rename()
        else:
            trainer.save_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        return {"saved_at": self.saved_at, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved_at, self.best = state_dict["saved_at"], state_dict["best"]
