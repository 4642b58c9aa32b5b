"""Pictures during flow training: the same prompts from the same noise through the averaged weights."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.files import write_atomically
from fluxflow_train.generation import Request, Settings, generate, settings_of
from fluxflow_train.pictures import grid, near_square, png, shared


class PromptGrid(L.Callback):
    """Writes `images_000012800.png`: captions of the tune split drawn by THE sampler with the task's own settings.

    `sample` writes the same file for the same prompts, settings and weights.
    """

    def __init__(self, folder: str, every_images: int, num_prompts: int, prompts: list[str] | None):
        """`prompts` in place of the `num_prompts` captions that the seed chooses."""
        self.folder, self.every_images = Path(folder), every_images
        self.num_prompts, self.prompts = num_prompts, prompts
        self.drawn_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.prompts is None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            count = data.num_samples("tune")
            order = rng.generator(data.seed, "sample-prompts").permutation(count).tolist()
            captions = (data.caption("tune", sample) for sample in order)
            self.prompts = list(itertools.islice(dict.fromkeys(filter(None, captions)), self.num_prompts))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        seen: int = pl_module.images_seen
        if seen // self.every_images > max(0, self.drawn_at) // self.every_images:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.images_seen > self.drawn_at:
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.drawn_at = pl_module.images_seen
        if not self.prompts:
            return
        settings = settings_of(pl_module.sampler, pl_module.seed)
        average = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        with average.averaged(pl_module):
            images = generate(
                pl_module.model, pl_module.objective, [Request(prompt, "", 0) for prompt in self.prompts], settings
            )
        if trainer.is_global_zero:  # a sharded model has no forward on one rank alone
            self.write(images, settings)

    def write(self, images: Tensor, settings: Settings) -> None:
        assert self.prompts is not None
        sheet = grid(images, self.prompts, near_square(len(images)))
        write_atomically(self.folder / f"images_{self.drawn_at:09d}.png", png(sheet, shared(settings, weights=None)))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_at": self.drawn_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn_at = state_dict["drawn_at"]
