"""The sampler against closed forms: a Gaussian mixture whose velocity, and so whose perfect network, is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fluxflow_train.models.text import TextFeatures
from fluxflow_train.objectives import RectifiedFlow, VPrediction
from fluxflow_train.sampling import Guidance, guided, joined, padded, sample

FLOW = RectifiedFlow(logit_normal_fraction=0.9, logit_normal_mean=0.0, logit_normal_std=1.0, shift=1.0)
VP = VPrediction(num_timesteps=1000, beta_start=0.00085, beta_end=0.012)
OBJECTIVES = pytest.mark.parametrize("objective", [FLOW, VP], ids=["flow", "vp"])
PLAIN = Guidance(1.0, (0.0, 1.0), 0.0)

MEANS = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 0.3, 0.8], [0.2, -1.2, 0.1]], dtype=torch.float64)
DEVIATIONS = torch.tensor([[0.4, 0.3, 0.5], [0.35, 0.6, 0.3], [0.5, 0.4, 0.45]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def denoised(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[z | alpha z + sigma eps = x] of the mixture; x (B, 3) float64."""
    variance = (alpha * DEVIATIONS).square() + sigma.square()
    distance = x[:, None] - alpha * MEANS
    share = (WEIGHTS.log() - 0.5 * (distance.square() / variance + variance.log()).sum(-1)).softmax(-1)
    return (share[..., None] * (MEANS + alpha * DEVIATIONS.square() / variance * distance)).sum(1)


def perfect(objective: RectifiedFlow | VPrediction) -> Callable[[Tensor, Tensor, TextFeatures], Tensor]:
    def flow(z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        x, t = z.flatten(1).double(), t[:1].double()
        alpha, sigma = objective.alpha_sigma(t) if isinstance(objective, VPrediction) else (1 - t, t)
        data = denoised(x, alpha, sigma)
        eps = (x - alpha * data) / sigma
        prediction = alpha * eps - sigma * data if isinstance(objective, VPrediction) else eps - data
        return prediction.float().view_as(z)

    return flow


def exact(x: Tensor, high: float, low: float) -> Tensor:
    """The end of dx/dlog(s) = x - E[z | x], x = z + s eps, from s = high to low, then E[z | x]: by Runge-Kutta."""

    def slope(x: Tensor, log_s: float) -> Tensor:
        return x - denoised(x, torch.ones(1).double(), torch.full((1,), math.exp(log_s)).double())

    count = 1500
    start, h = math.log(high), (math.log(low) - math.log(high)) / count
    for i in range(count):
        at = start + i * h
        k1 = slope(x, at)
        k2 = slope(x + h / 2 * k1, at + h / 2)
        k3 = slope(x + h / 2 * k2, at + h / 2)
        k4 = slope(x + h * k3, at + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x - slope(x, math.log(low))


def condition(batch: int, tokens: int = 1, value: float = 0.0) -> TextFeatures:
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return TextFeatures(torch.full((batch, tokens, 2), value), mask, torch.full((batch, 2), value))


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(128, 3, 1, 1, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ends(noise: Tensor) -> dict[type, Tensor]:
    """Where the noise goes, by objective."""
    x = noise.flatten(1).double()
    alpha, sigma = VP.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = (sigma / alpha).tolist()
    return {
        RectifiedFlow: exact(x * 1e6, (1 - 1e-6) / 1e-6, 1e-4),
        VPrediction: exact(x * math.sqrt(high**2 + 1), high, low),
    }


def errors(
    objective: RectifiedFlow | VPrediction, solver: str, noise: Tensor, end: Tensor, counts: tuple[int, ...]
) -> list[float]:
    """Root mean square over samples and dimensions; the mixture's own deviation is about 0.9."""
    condition_ = condition(len(noise))
    results = [
        sample(perfect(objective), objective, condition_, condition_, noise, solver=solver, steps=n, guidance=PLAIN)
        for n in counts
    ]
    return [float((r.flatten(1).double() - end).square().mean().sqrt()) for r in results]


@OBJECTIVES
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_at_its_order(
    objective: RectifiedFlow | VPrediction, solver: str, order: int, noise: Tensor, ends: dict[type, Tensor]
) -> None:
    coarse, middle, fine = errors(objective, solver, noise, ends[type(objective)], (32, 64, 128))
    assert math.log2(coarse / middle) == pytest.approx(order, abs=0.15)
    assert math.log2(middle / fine) == pytest.approx(order, abs=0.15)


@OBJECTIVES
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_multistep_solver_reaches_its_floor(
    objective: RectifiedFlow | VPrediction, solver: str, noise: Tensor, ends: dict[type, Tensor]
) -> None:
    few, many = errors(objective, solver, noise, ends[type(objective)], (20, 256))
    (euler,) = errors(objective, "euler", noise, ends[type(objective)], (20,))
    assert few < 0.012 and few < euler / 3
    assert many < 2e-4


@OBJECTIVES
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_samples_have_the_moments_of_the_data(objective: RectifiedFlow | VPrediction, solver: str) -> None:
    noise = torch.randn(20_000, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    text = condition(len(noise))
    z = sample(perfect(objective), objective, text, text, noise, solver=solver, steps=30, guidance=PLAIN).flatten(1)
    mean = WEIGHTS @ MEANS
    second = WEIGHTS @ (DEVIATIONS.square() + MEANS.square())
    torch.testing.assert_close(z.double().mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.double().var(0), second - mean.square(), atol=0.08, rtol=0)


class Recorder:
    """A network that predicts what its text says and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, float]] = []

    def __call__(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        assert len(z) == len(t) == len(text.pooled)
        self.asked.append((len(z), text.mask.shape[1], float(t[0])))
        return text.pooled[:, :1, None, None] * z


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_scale_one_costs_one_half_and_the_interval_limits_the_rest(solver: str, noise: Tensor) -> None:
    cond, null = condition(4, 3), condition(4, 5)
    single, double, partial = Recorder(), Recorder(), Recorder()
    for flow, guidance in (
        (single, PLAIN),
        (double, Guidance(3.0, (0.0, 1.0), 0.0)),
        (partial, Guidance(3.0, (0.3, 0.7), 0.0)),
    ):
        steps: list[int] = []
        sample(
            flow,
            FLOW,
            cond,
            null,
            noise[:4],
            solver=solver,
            steps=10,
            guidance=guidance,
            on_step=lambda steps=steps: steps.append(1),
        )
        assert len(steps) == len(flow.asked) == (19 if solver == "heun" else 10)
    assert {(batch, tokens) for batch, tokens, _ in single.asked} == {(4, 3)}
    assert {(batch, tokens) for batch, tokens, _ in double.asked} == {(8, 5)}
    assert all(batch == (8 if 0.3 <= t <= 0.7 else 4) for batch, _, t in partial.asked)
    assert len({batch for batch, _, _ in partial.asked}) == 2


def test_guidance_leads_away_from_the_null_condition(noise: Tensor) -> None:
    """With predictions linear in z, guidance between a z and b z is the prediction (b + w (a - b)) z."""
    guidance = Guidance(2.5, (0.0, 1.0), 0.0)
    z = sample(
        Recorder(),
        FLOW,
        condition(4, value=0.8),
        condition(4, value=0.3),
        noise[:4],
        solver="euler",
        steps=10,
        guidance=guidance,
    )
    factor = math.prod([1 - (1 - 1e-6) / 10 * (0.3 + 2.5 * (0.8 - 0.3))] * 10)
    torch.testing.assert_close(z, noise[:4] * factor, rtol=1e-5, atol=1e-6)


def test_rescale_gives_the_deviation_of_the_conditional_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 3, 4, 5, 5, generator=generator).unbind()
    plain = guided(cond, null, Guidance(6.0, (0.0, 1.0), 0.0))
    torch.testing.assert_close(plain, 6 * cond - 5 * null)
    whole = guided(cond, null, Guidance(6.0, (0.0, 1.0), 1.0))
    for i in range(3):
        assert float(whole[i].std()) == pytest.approx(float(cond[i].std()), rel=1e-5)
    torch.testing.assert_close(guided(cond, null, Guidance(6.0, (0.0, 1.0), 0.7)), 0.7 * whole + 0.3 * plain)
    assert guided(cond * 0, null * 0, Guidance(6.0, (0.0, 1.0), 0.7)).abs().max() == 0


def test_text_is_padded_by_tokens_that_are_not_valid() -> None:
    short, long = condition(2, 3, 1.0), condition(2, 5, 2.0)
    both = joined(short, long)
    assert both.tokens.shape == (4, 5, 2) and both.mask.sum(1).tolist() == [3, 3, 5, 5]
    assert both.tokens[:2, 3:].abs().max() == 0
    torch.testing.assert_close(both.pooled, torch.cat([short.pooled, long.pooled]))
    assert padded(short, 3).tokens.equal(short.tokens)


def test_precision_is_pinned(noise: Tensor) -> None:
    """An autocast around the sampler changes nothing in it."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) / 2

    def flow(z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return (z.flatten(1) @ weight).view_as(z)

    def run() -> Tensor:
        text = condition(8)
        return sample(flow, FLOW, text, text, noise[:8], solver="unipc", steps=4, guidance=PLAIN)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run().equal(expected)
