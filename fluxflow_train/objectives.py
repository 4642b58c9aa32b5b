"""What the flow is trained towards: the path from data to noise, the target on it, the times it is asked at.

Time runs from t = 0 (data) to t = 1 (noise). An objective is a frozen dataclass of plain numbers: it travels in
`model.json`, and training, validation, sampling and export all read the schedule from it.
Legend: B batch, ... the rest of a latent's shape; z data, eps standard normal noise, z_t = alpha z + sigma eps.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fluxflow_train.solvers import Scheduler, flow_scheduler, variance_preserving_scheduler

KARRAS_RHO = 7


class Objective(Protocol):
    """What the training and the sampler ask of a schedule."""

    def times(self, u: Tensor) -> Tensor:
        """Training times (B,) in [0, 1] from two uniform draws for each sample, u (B, 2) in [0, 1)."""
        ...

    def interpolate(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t (B, ...) at times t (B,)."""
        ...

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network predicts from z_t and t; (B, ...)."""
        ...

    def grid(self, steps: int) -> Tensor:
        """The times (steps >= 1,) that sampling visits whatever the solver, falling; from the last it steps to data."""
        ...

    def scheduler(self, solver: str, steps: int) -> Scheduler:
        """A fresh scheduler on `grid(steps)`.

        Raises:
            UserError: there is no such solver.
        """
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths, z_t = (1 - t) z + t eps, and their velocity, eps - z.

    Times are logit-normal with probability `logit_normal_fraction`, else uniform: the logit-normal alone hardly visits
    t near 1, where sampling starts. `shift` > 1 moves training and sampling towards noise; 1 leaves them.
    Source: Lipman et al. 2023; Liu et al. 2023; Esser et al. 2024 (section 3.1 the times, eq. 23 the shift).
    """

    logit_normal_fraction: float
    logit_normal_mean: float
    logit_normal_std: float
    shift: float

    def __post_init__(self) -> None:
        if not 0 <= self.logit_normal_fraction <= 1:
            raise ValueError(f"logit_normal_fraction must be in [0, 1], got {self.logit_normal_fraction}")
        if self.logit_normal_std <= 0 or self.shift <= 0:
            raise ValueError(
                f"logit_normal_std and shift must be positive, got {self.logit_normal_std} and {self.shift}"
            )

    def shifted(self, t: Tensor) -> Tensor:
        """t' = s t / (1 + (s - 1) t)."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def times(self, u: Tensor) -> Tensor:
        """u[:, 0] chooses the part of the mixture, u[:, 1] the place in it."""
        part, place = u.unbind(1)
        normal = self.logit_normal_mean + self.logit_normal_std * torch.special.ndtri(place)
        return self.shifted(torch.where(part < self.logit_normal_fraction, normal.sigmoid(), place))

    def interpolate(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(z, eps, like(t, z))

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - z

    def grid(self, steps: int) -> Tensor:
        """Even in t, then shifted; it starts a millionth below 1, where log(1 - t), which UniPC takes, is finite."""
        return self.shifted(torch.linspace(1 - 1e-6, 0, steps + 1, dtype=torch.float64)[:-1])

    def scheduler(self, solver: str, steps: int) -> Scheduler:
        times = self.grid(steps)
        return flow_scheduler(solver, times, times)


@dataclass(frozen=True)
class VPrediction:
    """The variance-preserving path of a diffusion with scaled-linear betas, and v = alpha eps - sigma z on it.

    Continuous time: t is timestep / (num_timesteps - 1), the log signal-to-noise ratio linear between timesteps.
    At t = 0 a little noise is left and at t = 1 a little signal, as in the discrete schedule. Times are uniform.
    Source: Salimans & Ho 2022 (v); Rombach et al. 2022 (the betas).
    """

    num_timesteps: int
    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must be 0 < beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}")

    def times(self, u: Tensor) -> Tensor:
        """u[:, 1]; u[:, 0] goes unused."""
        return u[:, 1]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, each like t; alpha^2 + sigma^2 = 1."""
        log_snr = log_snr_table(self, t.device)
        place = t.double() * (self.num_timesteps - 1)
        low = place.floor().clamp(0, self.num_timesteps - 2)
        index = low.long()
        value = torch.lerp(log_snr[index], log_snr[index + 1], place - low)
        return value.sigmoid().sqrt().to(t.dtype), (-value).sigmoid().sqrt().to(t.dtype)

    def interpolate(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return like(alpha, z) * z + like(sigma, z) * eps

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return like(alpha, z) * eps - like(sigma, z) * z

    def grid(self, steps: int) -> Tensor:
        """From t = 1 to t = 0, even in the seventh root of sigma / alpha.

        With even steps in t the last ones are large in sigma, and neither Heun nor DPM-Solver++ reaches its order.
        Source: Karras et al. 2022, eq. 5.
        """
        log_snr = log_snr_table(self, torch.device("cpu"))
        first, last = (-log_snr[[-1, 0]] / 2).exp() ** (1 / KARRAS_RHO)
        ratio = torch.lerp(first, last, torch.linspace(0, 1, steps, dtype=torch.float64)) ** KARRAS_RHO
        return self.time_of(-2 * ratio.log())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The t at which log(alpha^2 / sigma^2) is `log_snr`: the inverse of `alpha_sigma`."""
        rising = log_snr_table(self, log_snr.device).flip(0)
        high = torch.searchsorted(rising, log_snr).clamp(1, self.num_timesteps - 1)
        low = high - 1
        place = low + (log_snr - rising[low]) / (rising[high] - rising[low])
        return (1 - place / (self.num_timesteps - 1)).clamp(0, 1)

    def scheduler(self, solver: str, steps: int) -> Scheduler:
        times = self.grid(steps)
        alpha, sigma = self.alpha_sigma(times)
        return variance_preserving_scheduler(solver, times, sigma / alpha)


@cache
def log_snr_table(objective: VPrediction, device: torch.device) -> Tensor:
    """log(alpha^2 / sigma^2) of each discrete timestep, (num_timesteps,) float64."""
    ends = objective.beta_start**0.5, objective.beta_end**0.5
    root = torch.linspace(*ends, objective.num_timesteps, dtype=torch.float64)
    alpha_bar = (1 - root.square()).cumprod(0)
    return (alpha_bar.log() - (1 - alpha_bar).log()).to(device)


def like(t: Tensor, z: Tensor) -> Tensor:
    """(B,) to (B, 1, ...), to be multiplied with z (B, ...)."""
    return t.view(-1, *[1] * (z.ndim - 1)).to(z.dtype)
