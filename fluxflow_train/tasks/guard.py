"""NaN and Inf: the update is left out on the device, counted, and training stops when there are too many."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train.errors import UserError
from fluxflow_train.sharding import whole


@dataclass
class BadStep:
    """An update that was left out: when, and for which samples."""

    images_seen: int
    keys: list[str]


class Guard:
    """Applies an update only where its gradients are finite, and remembers where they were not.

    The flag stays on the device (fused optimizers read it there); `read` is the only place that waits for it.
    """

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.num_bad_steps = 0
        self._flags: list[tuple[Tensor, int, list[str]]] = []

    def step(self, net: nn.Module, optimizer: Optimizer, clip_norm: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients of `net` and mark `optimizer` to skip its next step if anything is NaN or Inf.

        Returns:
            the gradient norm before clipping and the flag (1 where the step will be left out), both on the device.
        """
        norm = whole(nn.utils.clip_grad_norm_(net.parameters(), clip_norm))
        found_inf = (~norm.isfinite()).float()
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        return norm, found_inf

    def remember(self, found_inf: Tensor, images_seen: int, keys: list[str]) -> None:
        self._flags.append((found_inf, images_seen, keys))

    def read(self) -> list[BadStep]:
        """The updates left out since the last reading."""
        if not self._flags:
            return []
        bad = torch.stack([flag for flag, _, _ in self._flags]).bool().tolist()
        steps = [BadStep(seen, keys) for is_bad, (_, seen, keys) in zip(bad, self._flags, strict=True) if is_bad]
        self._flags.clear()
        self.num_bad_steps += len(steps)
        return steps

    def check(self, steps: list[BadStep]) -> None:
        """Raises UserError where `steps`, the last reading, made more than `max_bad_steps` in the whole run."""
        if steps and self.num_bad_steps > self.max_bad_steps:
            last = steps[-1]
            raise UserError(
                f"{self.num_bad_steps} updates had NaN or Inf (last at {last.images_seen:,} images, samples "
                f"{', '.join(last.keys[:4])}, ...), more than task.max_bad_steps={self.max_bad_steps}: lower "
                "task.optimizer.lr, or look at those samples (bad_steps.txt in the run directory)"
            )
