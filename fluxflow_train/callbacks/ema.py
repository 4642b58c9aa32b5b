"""A running average of the trained weights, with a half-life in images.

The average is of parameters only, in fp32 at least. Buffers are not averaged: the live ones (latent statistics) serve
both sets of weights, and stay where they are when the average is swapped in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fluxflow_train.errors import UserError
from fluxflow_train.losses import at_least_fp32
from fluxflow_train.schedule import ema_decay, ema_halflife
from fluxflow_train.sharding import placed_like, whole


class EMA(L.Callback):
    """Averages what `pl_module.ema_modules() -> dict[str, nn.Module]` returns, after every batch.

    The task counts `pl_module.images_seen` in its training step, over all ranks. Validation and test see the average;
    others reach it through `averaged`. Everything is done on the device; the host waits for nothing.
    """

    def __init__(self, budget_images: int, ramp: float = 0.05, longest: float = 0.1) -> None:
        """Half-life: `min(ramp * images_seen, longest * budget_images)` images."""
        self.budget_images = budget_images
        self.ramp = ramp
        self.longest = longest
        self.images_seen: int = 0
        self.average: dict[str, Tensor] = {}
        self.live: dict[str, Tensor] = {}  # the trained weights, while the average is in the model
        self.depth = 0  # how many users the average in the model has

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = parameters(pl_module)
        if not self.average:  # a resumed run has its own
            self.average = {name: at_least_fp32(p.detach()).clone() for name, p in weights.items()}
            self.images_seen = images_seen(pl_module)
        if {k: v.shape for k, v in self.average.items()} != {k: p.shape for k, p in weights.items()}:
            raise UserError(
                "the checkpoint averages weights of another architecture: resume with its config, or give another run="
            )
        self.average = {name: placed_like(self.average[name], p) for name, p in weights.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        seen = images_seen(pl_module)
        decay = ema_decay(seen - self.images_seen, ema_halflife(seen, self.budget_images, self.ramp, self.longest))
        self.images_seen = seen
        weights = [at_least_fp32(p) for p in parameters(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)  # type: ignore[reportPrivateImportUsage]

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The average stands in the model inside, the trained weights again, bit for bit, after. May be nested."""
        self._enter(pl_module)
        try:
            yield
        finally:
            self._leave(pl_module)

    @torch.no_grad()
    def _enter(self, pl_module: L.LightningModule) -> None:
        if self.depth == 0:
            for name, p in parameters(pl_module).items():
                self.live[name] = p.detach().clone()
                p.copy_(self.average[name])
        self.depth += 1

    @torch.no_grad()
    def _leave(self, pl_module: L.LightningModule) -> None:
        self.depth -= 1
        if self.depth == 0:
            for name, p in parameters(pl_module).items():
                p.copy_(self.live.pop(name))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:  # none when validation runs without a fit
            self._enter(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.depth:
            self._leave(pl_module)

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)  # a validation cut short must not leave the average behind

    def state_dict(self) -> dict[str, Any]:
        if self.depth:
            raise RuntimeError("a checkpoint was asked for while the averaged weights are in the model")
        return {"average": {name: whole(p) for name, p in self.average.items()}, "images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]
        self.images_seen = state_dict["images_seen"]


def images_seen(pl_module: L.LightningModule) -> int:
    return pl_module.images_seen  # type: ignore[return-value]


def parameters(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    """Every averaged parameter under `<net>.<name>`."""
    modules: dict[str, nn.Module] = pl_module.ema_modules()  # type: ignore[operator]
    return {f"{net}.{name}": p for net, module in modules.items() for name, p in module.named_parameters()}
