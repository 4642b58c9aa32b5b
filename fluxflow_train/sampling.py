"""THE sampler: guidance and a solver. Validation, evaluation, `sample` and export all call it.

Legend: B batch, D latent channels, h w latent grid, S text tokens, E condition width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.models.text import TextFeatures
from fluxflow_train.objectives import Objective

Flow = Callable[[Tensor, Tensor, TextFeatures], Tensor]


class Guidance(NamedTuple):
    """How the conditional and the unconditional prediction are combined.

    scale: 1 is the conditional prediction alone; interval: (low, high), the times t outside of which scale is 1;
    rescale: in [0, 1], how far the guided prediction returns to the deviation of the conditional one.
    Source: Ho & Salimans 2022 (scale); Kynkaanniemi et al. 2024 (interval); Lin et al. 2023 (rescale).
    """

    scale: float
    interval: tuple[float, float]
    rescale: float

    def acts_at(self, t: float) -> bool:
        return self.scale != 1 and self.interval[0] <= t <= self.interval[1]


@torch.no_grad()
def sample(
    flow: Flow,
    objective: Objective,
    cond: TextFeatures,
    null: TextFeatures,
    noise: Tensor,
    *,
    solver: str,
    steps: int,
    guidance: Guidance,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """The latent (B, D, h, w) that `noise` (B, D, h, w), standard normal, becomes under `cond`.

    float32 throughout. `null` is the condition to lead away from: a negative prompt's, or that of no caption; where
    guidance acts both halves run in one batch of 2B, elsewhere `cond` runs alone. `on_step` is called after every
    evaluation of the network: `steps` times, 2 `steps` - 1 for Heun.

    Raises:
        UserError: there is no such solver.
    """
    scheduler = objective.scheduler(solver, steps)
    both = joined(cond, null)
    with torch.autocast(noise.device.type, enabled=False):
        z = noise.float() * scheduler.init_noise_sigma
        for t in scheduler.timesteps.tolist():
            x = scheduler.scale_model_input(z, t)
            if guidance.acts_at(t):
                halves = flow(x.repeat(2, 1, 1, 1), x.new_full((2 * len(x),), t), both)
                prediction = guided(*halves.chunk(2), guidance)
            else:
                prediction = flow(x, x.new_full((len(x),), t), cond)
            z = scheduler.step(prediction, t, z, return_dict=False)[0]
            if on_step is not None:
                on_step()
    return z


def guided(cond: Tensor, null: Tensor, guidance: Guidance) -> Tensor:
    """null + scale (cond - null), its deviation per sample led back to that of `cond`; all (B, ...).

    Source: Lin et al. 2023, eq. 15 and 16 (rescale).
    """
    prediction = null + guidance.scale * (cond - null)
    if guidance.rescale == 0:
        return prediction
    ratio = cond.flatten(1).std(1) / prediction.flatten(1).std(1).clamp(min=1e-12)  # a new network predicts 0
    ratio = ratio.view(-1, *[1] * (cond.ndim - 1))
    return prediction * (guidance.rescale * ratio + (1 - guidance.rescale))


def padded(text: TextFeatures, num_tokens: int) -> TextFeatures:
    """The same condition with tokens and mask filled up to `num_tokens`."""
    missing = num_tokens - text.mask.shape[1]
    return TextFeatures(F.pad(text.tokens, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)), text.pooled)


def joined(first: TextFeatures, second: TextFeatures) -> TextFeatures:
    """Two conditions one after the other along the batch, padded to the longer one."""
    num_tokens = max(first.mask.shape[1], second.mask.shape[1])
    parts = zip(padded(first, num_tokens), padded(second, num_tokens), strict=True)
    return TextFeatures(*(torch.cat(pair) for pair in parts))
