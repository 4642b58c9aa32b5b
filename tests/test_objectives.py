import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from fluxflow_train.cli import config_folder
from fluxflow_train.errors import UserError
from fluxflow_train.objectives import RectifiedFlow, VPrediction
from fluxflow_train.solvers import SOLVERS

FLOW = RectifiedFlow(logit_normal_fraction=0.9, logit_normal_mean=0.0, logit_normal_std=1.0, shift=1.0)
SHIFTED = dataclasses.replace(FLOW, shift=3.0)
VP = VPrediction(num_timesteps=1000, beta_start=0.00085, beta_end=0.012)
OBJECTIVES = pytest.mark.parametrize("objective", [FLOW, SHIFTED, VP], ids=["flow", "shifted", "vp"])


def latents(seed: int, batch: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rectified_flow_target_is_the_velocity_of_its_path() -> None:
    z, eps, t = latents(0), latents(1), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    _, velocity = torch.func.jvp(lambda t: FLOW.interpolate(z, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(FLOW.target(z, eps, t), velocity)
    torch.testing.assert_close(FLOW.interpolate(z, eps, t * 0), z)
    torch.testing.assert_close(FLOW.interpolate(z, eps, t * 0 + 1), eps)


def test_v_prediction_is_diffusers_at_every_timestep() -> None:
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.arange(1000)
    z, eps = latents(0, 1000, torch.float32), latents(1, 1000, torch.float32)
    t = timesteps / 999
    torch.testing.assert_close(VP.interpolate(z, eps, t), reference.add_noise(z, eps, timesteps), atol=1e-5, rtol=0)  # type: ignore[arg-type]
    torch.testing.assert_close(VP.target(z, eps, t), reference.get_velocity(z, eps, timesteps), atol=1e-5, rtol=0)  # type: ignore[arg-type]


def test_v_prediction_is_monotone_and_inverted_between_timesteps() -> None:
    t = torch.linspace(0, 1, 4321, dtype=torch.float64)
    alpha, sigma = VP.alpha_sigma(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t))
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(VP.time_of(2 * (alpha / sigma).log()), t, atol=1e-9, rtol=0)


def test_times_follow_the_mixture() -> None:
    u = torch.from_numpy(np.random.default_rng(0).random((40_000, 2)))
    t = FLOW.times(u).numpy()

    def cdf(x: np.ndarray) -> np.ndarray:
        return 0.9 * stats.norm.cdf(np.log(x / (1 - x))) + 0.1 * x

    assert stats.kstest(t, cdf).pvalue > 0.01
    assert stats.kstest(FLOW.times(u).numpy(), "uniform").pvalue < 1e-6
    assert stats.kstest(VP.times(u).numpy(), "uniform").pvalue > 0.01


def test_extreme_draws_give_times_in_range() -> None:
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    u = torch.tensor([[a, b] for a in (0.0, 0.95) for b in (0.0, 1e-30, below_one)])
    for objective in (FLOW, SHIFTED, VP):
        t = objective.times(u)
        assert ((t >= 0) & (t <= 1)).all()


def test_shift_moves_times_and_grid_towards_noise() -> None:
    u = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    odds = FLOW.times(u) / (1 - FLOW.times(u))
    torch.testing.assert_close(SHIFTED.times(u) / (1 - SHIFTED.times(u)), 3 * odds, rtol=1e-4, atol=0)
    odds = FLOW.grid(9) / (1 - FLOW.grid(9))
    torch.testing.assert_close(SHIFTED.grid(9) / (1 - SHIFTED.grid(9)), 3 * odds)


def test_v_prediction_grid_is_that_of_karras() -> None:
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    i = torch.arange(12, dtype=torch.float64) / 11
    expected = (sigma[999] ** (1 / 7) + i * (sigma[0] ** (1 / 7) - sigma[999] ** (1 / 7))) ** 7
    alpha, noise = VP.alpha_sigma(VP.grid(12))
    torch.testing.assert_close(noise / alpha, expected, rtol=1e-6, atol=0)


@OBJECTIVES
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_every_solver_is_on_the_one_grid(objective: RectifiedFlow | VPrediction, steps: int) -> None:
    times = objective.grid(steps)
    assert len(times) == steps and times[0] == pytest.approx(1, abs=2e-6) and (times.diff() < 0).all()
    alpha, sigma = (1 - times, times) if isinstance(objective, RectifiedFlow) else objective.alpha_sigma(times)
    ratio = sigma if isinstance(objective, RectifiedFlow) else sigma / alpha
    expected = torch.cat([ratio, torch.zeros(1)]).float()
    for solver in SOLVERS:
        scheduler = objective.scheduler(solver, steps)
        visits = [0, *range(1, 2 * steps - 1, 2)] if solver == "heun" else list(range(steps))
        assert len(scheduler.timesteps) == (2 * steps - 1 if solver == "heun" else steps)
        torch.testing.assert_close(scheduler.timesteps[visits], times.float(), rtol=0, atol=0)
        torch.testing.assert_close(scheduler.sigmas[[*visits, -1]], expected, rtol=0, atol=0)


@OBJECTIVES
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_network_is_asked_where_it_was_trained(objective: RectifiedFlow | VPrediction, solver: str) -> None:
    """With one image as the data, every solver walks along the training path of that image and ends in it."""
    z, eps = latents(0, 1, torch.float32), latents(1, 1, torch.float32)
    scheduler = objective.scheduler(solver, 12)
    x = objective.interpolate(z, eps, scheduler.timesteps[:1]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(shown, objective.interpolate(z, eps, t[None]), rtol=0, atol=2e-4)
        x = scheduler.step(objective.target(z, eps, t[None]), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, z, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["rectified_flow", "v_prediction"])
def test_configuration_travels_as_json(name: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(config_folder() / "objective" / f"{name}.yaml"))
    assert isinstance(node, dict)
    objective = instantiate(node)
    fields = {"_target_": node["_target_"], **dataclasses.asdict(objective)}
    assert fields == node
    assert instantiate(json.loads(json.dumps(fields))) == objective == (FLOW if name == "rectified_flow" else VP)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_normal_fraction must be in \[0, 1\], got 1.5"):
        dataclasses.replace(FLOW, logit_normal_fraction=1.5)
    with pytest.raises(ValueError, match=r"must be positive, got 1\.0 and 0"):
        dataclasses.replace(FLOW, shift=0)
    with pytest.raises(ValueError, match="num_timesteps must be at least 2, got 1"):
        dataclasses.replace(VP, num_timesteps=1)
    with pytest.raises(ValueError, match="betas must be"):
        dataclasses.replace(VP, beta_end=1.0)
    with pytest.raises(UserError, match="solver=ddim is none of ours"):
        VP.scheduler("ddim", 5)
