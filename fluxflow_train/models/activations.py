"""What every activation arm offers: how many channels it eats, and a function of unit second moment.

Shapes: B batch, C channels. An arm reads `expansion * C` channels along `dim` and returns C; its k-th projection of
channel f is channel `k * C + f` (planar), so one network definition serves all arms.

Unit second moment: for independent N(0, 1) inputs `E[arm(x)^2] = 1` before training. Without it the arms start with RMS
gains from 0.38 (`gate5`) to 1, and with the learning rate that difference is larger than any effect under study.
The constants are 1 / sqrt(E[f(x)^2]) by quadrature in float64; the test computes them again.
"""

import difflib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fluxflow_train.errors import UserError
from fluxflow_train.models.bezier import BezierActivation, TrainableBezier

# The cubic through t = sigmoid(x) nearest to SiLU (least squares under N(0, 1), RMS error 0.042), at unit gain.
SILU_CURVE = (-0.538797699689842, -0.127680535121199, -1.461268641956380, 4.956954672047695)


class BezierChannel(TrainableBezier):
    """A learned curve per channel, no gate; `channels` in, `channels` out. It starts as SiLU."""

    expansion = 1

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels, SILU_CURVE, dim)


class GatedActivation(nn.Module):
    """`gain * function(x_0, ..., x_{expansion-1})` with `channels` channels per projection; no parameters."""

    def __init__(self, function: Callable[..., Tensor], expansion: int, gain: float, channels: int, dim: int) -> None:
        super().__init__()
        self.function = function
        self.expansion = expansion
        self.gain = gain
        self.channels = channels
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.function(*x.split(self.channels, self.dim))

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, expansion={self.expansion}, gain={self.gain:.4f}, dim={self.dim}"


def leaky_relu(x: Tensor) -> Tensor:
    """Slope 0.2 below zero, as in the patch discriminators."""
    return F.leaky_relu(x, 0.2)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Source: Shazeer 2020, "GLU variants improve transformer", eq. 5."""
    return F.silu(gate) * value


def bilinear(gate: Tensor, value: Tensor) -> Tensor:
    """Gating without a nonlinearity. Source: Shazeer 2020, eq. 5."""
    return gate * value


def gate5(gate: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, x4: Tensor) -> Tensor:
    """Five projections, gated, no curve: `sigmoid(x_0) * sum_k silu(x_k) / 2`."""
    return gate.sigmoid() * (F.silu(x1) + F.silu(x2) + F.silu(x3) + F.silu(x4)) / 2


def mix5(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, x4: Tensor) -> Tensor:
    """Five projections, no gate: `sum_k silu(x_k) / sqrt(5)`.

    A sum before the nonlinearity would collapse to one projection.
    """
    return (F.silu(x0) + F.silu(x1) + F.silu(x2) + F.silu(x3) + F.silu(x4)) / 5**0.5


_GATED: dict[str, tuple[Callable[..., Tensor], int, float]] = {
    "relu": (F.relu, 1, 1.4142135623730951),
    "leaky_relu": (leaky_relu, 1, 1.3867504905630728),
    "silu": (F.silu, 1, 1.676532470331091),
    "gelu": (F.gelu, 1, 1.5335304411955353),
    "swiglu": (swiglu, 2, 1.676532470331091),
    "bilinear": (bilinear, 2, 1.0),
    "gate5": (gate5, 5, 2.6541722653764603),
    "mix5": (mix5, 5, 1.3781055961883941),
}

# The degree ladder: lines, parabolas and cubics of the same construction, with t = sigmoid and p = SiLU.
_BERNSTEIN = {
    "bernstein1": (1, 2.1016735866045866),
    "bernstein2": (2, 2.3489320776184277),
    "bezier": (3, 2.5193831610069815),
}

ARM_NAMES = ("bezier", *_GATED, "bernstein1", "bernstein2", "bezier_channel")


def arm(name: str, channels: int, dim: int = 1) -> nn.Module:
    """The activation `name`: returns `channels` channels along `dim`, eats `expansion` times as many.

    Raises:
        UserError: `name` is no arm.
    """
    if name in _GATED:
        function, expansion, gain = _GATED[name]
        return GatedActivation(function, expansion, gain, channels, dim)
    if name in _BERNSTEIN:
        degree, gain = _BERNSTEIN[name]
        return BezierActivation(dim=dim, degree=degree, gain=gain)
    if name == "bezier_channel":
        return BezierChannel(channels, dim)
    nearest = difflib.get_close_matches(name, ARM_NAMES, n=1, cutoff=0.0)[0]
    raise UserError(f"no activation is called {name!r}: did you mean {nearest!r}? There are {', '.join(ARM_NAMES)}.")
