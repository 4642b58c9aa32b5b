"""How far the run is: images, images per second, time left, the main scalars."""

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ImagesProgress(L.Callback):
    """A bar counted in images on a terminal, and a line for each validation anywhere else.

    `shown` maps the scalars of the task to the short names on the screen.
    """

    def __init__(self, shown: dict[str, str]):
        self.shown = shown
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.started = (time.perf_counter(), pl_module.images_seen)
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("images {task.fields[speed]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[scalars]}", style="dim"),
                console=self.console,
                speed_estimate_period=120,
            )
            self.task = self.bar.add_task(
                "training", total=pl_module.budget_images, completed=pl_module.images_seen, speed="", scalars=""
            )
            self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.bar is not None:
            speed = pl_module.latest.get("train/images_per_second")
            self.bar.update(
                self.task,
                completed=pl_module.images_seen,
                speed=f"{speed:.0f}/s" if speed else "",
                scalars=self.scalars(pl_module),
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description="training", scalars=self.scalars(pl_module))
        elif trainer.is_global_zero and not trainer.sanity_checking:
            clock, images = self.started
            seen: int = pl_module.images_seen
            elapsed = time.perf_counter() - clock
            left = elapsed / max(1, seen - images) * (pl_module.budget_images - seen)
            self.console.print(
                f"{seen:,}/{pl_module.budget_images:,} images, {elapsed:.0f} s, {max(0.0, left):.0f} s left, "
                f"{(seen - images) / elapsed:.0f} images/s, {self.scalars(pl_module)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def scalars(self, pl_module: Any) -> str:
        latest: dict[str, float] = pl_module.latest
        return "  ".join(f"{short} {latest[name]:.4g}" for name, short in self.shown.items() if name in latest)
