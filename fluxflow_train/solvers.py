"""Solvers: diffusers' schedulers, all set to one grid of times and sigmas.

Left to themselves they would disagree: each makes its own grid, DPM-Solver++ takes no sigmas and rounds its timesteps,
UniPC moves the first sigma, Heun has no way to be told. So the grid is set from outside, and `timesteps` hold the
continuous time t in [0, 1] that the network is asked at.
"""

from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from fluxflow_train.errors import UserError

SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")
Scheduler = Any  # `timesteps`, `init_noise_sigma`, `scale_model_input` and `step`, as diffusers' pipelines use them


class Unscaled:
    """The two members that diffusers' flow matching schedulers lack: their samples need no scale."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


class FlowEuler(Unscaled, FlowMatchEulerDiscreteScheduler):
    """z moves along v."""


class FlowHeun(Unscaled, FlowMatchHeunDiscreteScheduler):
    """z moves along the mean of v here and v where v leads."""


def flow_scheduler(solver: str, times: Tensor, sigmas: Tensor) -> Scheduler:
    """For z_t = (1 - sigma) z + sigma eps and its velocity; times and sigmas (steps,) falling, without the final 0.

    Raises:
        UserError: there is no such solver.
    """
    multistep = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    makers = (
        FlowEuler,
        FlowHeun,
        partial(DPMSolverMultistepScheduler, **multistep),
        partial(UniPCMultistepScheduler, **multistep),
    )
    return on_grid(choose(solver, makers), times, sigmas)


def variance_preserving_scheduler(solver: str, times: Tensor, sigmas: Tensor) -> Scheduler:
    """For z_t = alpha z + s eps, alpha^2 + s^2 = 1, and v; `sigmas` are s / alpha, as diffusers has them.

    Euler and Heun of diffusers work on z_t / alpha: "leading" starts them at noise of z_t's unit variance.

    Raises:
        UserError: there is no such solver.
    """
    makers = (
        partial(EulerDiscreteScheduler, prediction_type="v_prediction", timestep_spacing="leading"),
        partial(HeunDiscreteScheduler, prediction_type="v_prediction", timestep_spacing="leading"),
        partial(DPMSolverMultistepScheduler, prediction_type="v_prediction", solver_order=2),
        partial(UniPCMultistepScheduler, prediction_type="v_prediction", solver_order=2),
    )
    return on_grid(choose(solver, makers), times, sigmas)


def choose(solver: str, makers: tuple[Any, ...]) -> Scheduler:
    if solver not in SOLVERS:
        raise UserError(f"solver={solver} is none of ours: give one of {', '.join(SOLVERS)}")
    return makers[SOLVERS.index(solver)]()


def on_grid(scheduler: Scheduler, times: Tensor, sigmas: Tensor) -> Scheduler:
    """The same scheduler, ready for its first step at times[0]; Heun asks twice at every time but the first."""
    scheduler.set_timesteps(len(times))  # resets what a scheduler remembers of its steps
    visits = torch.arange(len(times)).repeat_interleave(scheduler.order)[scheduler.order - 1 :]
    scheduler.timesteps = times[visits].float()
    scheduler.sigmas = torch.cat([sigmas[visits], sigmas.new_zeros(1)]).float()
    scheduler.set_begin_index(0)  # steps are counted, not looked up by their time
    return scheduler
