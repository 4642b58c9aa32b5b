import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import ARM_NAMES, SILU_CURVE, arm

EXPANSION = {
    "bezier": 5,
    "relu": 1,
    "leaky_relu": 1,
    "silu": 1,
    "gelu": 1,
    "swiglu": 2,
    "bilinear": 2,
    "gate5": 5,
    "mix5": 5,
    "bernstein1": 3,
    "bernstein2": 4,
    "bezier_channel": 1,
}

# The trapezoid rule on an analytic function converges exponentially: exact to float64 at this step.
STEP = 1 / 256
NODES = np.arange(-40, 40, STEP)
WEIGHTS = np.exp(-(NODES**2) / 2) / math.sqrt(2 * math.pi) * STEP
SIGMOID = 1 / (1 + np.exp(-NODES))
SILU = NODES * SIGMOID


def expectation(values: np.ndarray) -> float:
    return float((values * WEIGHTS).sum())


def bernstein(degree: int) -> list[np.ndarray]:
    return [math.comb(degree, k) * (1 - SIGMOID) ** (degree - k) * SIGMOID**k for k in range(degree + 1)]


def unscaled_second_moment(name: str) -> float:
    mean, square = expectation(SILU), expectation(SILU**2)
    variance = square - mean**2
    gelu = NODES * np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in NODES])

    def curve(degree: int) -> float:  # E[(sum_k b_k(t) p_k)^2] with sum_k b_k = 1
        return variance * sum(expectation(b**2) for b in bernstein(degree)) + mean**2

    moments: dict[str, Callable[[], float]] = {
        "relu": lambda: 0.5,
        "leaky_relu": lambda: (1 + 0.2**2) / 2,
        "silu": lambda: square,
        "gelu": lambda: expectation(gelu**2),
        "swiglu": lambda: square,
        "bilinear": lambda: 1.0,
        "gate5": lambda: expectation(SIGMOID**2) * (4 * variance + 16 * mean**2) / 4,
        "mix5": lambda: (5 * variance + 25 * mean**2) / 5,
        "bernstein1": lambda: curve(1),
        "bernstein2": lambda: curve(2),
        "bezier": lambda: curve(3),
    }
    return moments[name]()


def test_every_arm_has_its_expansion() -> None:
    assert {name: arm(name, 4).expansion for name in ARM_NAMES} == EXPANSION


@pytest.mark.parametrize("name", [name for name in ARM_NAMES if name != "bezier_channel"])
def test_gain_is_the_quadrature(name: str) -> None:
    assert arm(name, 4).gain == pytest.approx(unscaled_second_moment(name) ** -0.5, rel=1e-12)


def test_silu_curve_is_the_least_squares_fit_at_unit_second_moment() -> None:
    basis = np.stack(bernstein(3))
    points = np.linalg.solve((basis * WEIGHTS) @ basis.T, (basis * WEIGHTS) @ SILU)
    curve = points @ basis
    assert expectation((curve - SILU) ** 2) ** 0.5 < 0.043
    np.testing.assert_allclose(SILU_CURVE, points / expectation(curve**2) ** 0.5, rtol=1e-9)
    assert expectation((np.array(SILU_CURVE) @ basis) ** 2) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("name", ARM_NAMES)
def test_unit_second_moment_of_the_module(name: str) -> None:
    module = arm(name, 8).double()
    x = torch.randn(20000, EXPANSION[name] * 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert module(x).square().mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dim", [1, -1, 2])
@pytest.mark.parametrize("name", ARM_NAMES)
def test_any_dim_gives_the_same_numbers(name: str, dim: int) -> None:
    x = torch.randn(2, EXPANSION[name] * 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = arm(name, 3).double()(x)
    assert expected.shape == (2, 3, 5, 4)
    moved = arm(name, 3, dim=dim).double()(x.movedim(1, dim)).movedim(dim, 1)
    torch.testing.assert_close(moved, expected)


def test_projections_are_planar() -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    module = arm("swiglu", 3)
    gain = unscaled_second_moment("swiglu") ** -0.5
    expected = gain * torch.nn.functional.silu(x[:, :3]) * x[:, 3:]
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("name", ARM_NAMES)
def test_every_projection_gets_a_gradient(name: str) -> None:
    x = torch.randn(16, EXPANSION[name] * 2, generator=torch.Generator().manual_seed(3), requires_grad=True)
    module = arm(name, 2)
    module(x).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(0) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert len(list(module.parameters())) == (1 if name == "bezier_channel" else 0)


def test_unknown_arm_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match="did you mean 'swiglu'") as error:
        arm("swigloo", 4)
    assert all(name in str(error.value) for name in ARM_NAMES)
