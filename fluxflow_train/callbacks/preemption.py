"""Ending between two batches, with everything saved, when a signal or the clock asks for it."""

from typing import Any

import lightning as L

from fluxflow_train import preemption, ranks
from fluxflow_train.callbacks.checkpoint import Checkpoint
from fluxflow_train.errors import Stopped


class Preemption(L.Callback):
    """Saves `last.ckpt` and raises Stopped, on all ranks at the same batch.

    One process looks after every batch. Several agree on it whenever the task records, so that nothing waits in
    between, and after a validation. Stands behind the other callbacks: what they do for a batch is done.
    """

    def __init__(self, hours: float | None):
        """`hours` since the command began; None leaves the clock out."""
        self.hours = hours

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        between: Any = trainer.val_check_batch
        if (batch_idx + 1) % between == 0:  # a validation follows; a run resumed from here would leave it out
            return
        if trainer.world_size == 1 or pl_module.images_seen == pl_module.last_record[0]:
            self.look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.training:
            self.look(trainer, pl_module)

    def look(self, trainer: L.Trainer, pl_module: Any) -> None:
        reasons = [reason for reason in ranks.gather(self.reason()) if reason]
        seen: int = pl_module.images_seen
        if not reasons or seen >= pl_module.budget_images:
            return
        checkpoint = next(c for c in trainer.callbacks if isinstance(c, Checkpoint))  # type: ignore[attr-defined]
        if seen > checkpoint.saved_at:
            checkpoint.save(trainer, seen)
        raise Stopped(f"stopped by {reasons[0]} at {seen:,} of {pl_module.budget_images:,} images, saved")

    def reason(self) -> str:
        over = self.hours is not None and preemption.hours_passed() >= self.hours
        return preemption.noted() or (f"budget.hours={self.hours:g}" if over else "")
