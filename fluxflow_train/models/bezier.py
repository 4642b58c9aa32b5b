"""Bezier curves as activations: the input itself chooses the curve and the point on it.

B batch, C channels, K = degree + 2 channels eaten per channel returned: t, then the control points p_0..p_degree.
N outer and M inner positions of the one memory order that every input is brought to: contiguous (N, K, M).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fluxflow_train.models.bezier_kernel import BezierFunction

PreActivation = Literal["sigmoid", "tanh", "silu", "none"]
Layout = Literal["interleaved", "planar"]
PRE_ACTIVATIONS = ("sigmoid", "tanh", "silu", "none")
LAYOUTS = ("interleaved", "planar")


def bezier(
    x: Tensor,
    *,
    t_activation: PreActivation,
    p_activation: PreActivation,
    layout: Layout,
    dim: int,
    degree: int = 3,
    gain: float = 1.0,
) -> Tensor:
    """`gain * B(f_t(x_t); f_p(x_0), ..., f_p(x_degree))`: `K * C` channels to `C` along `dim`, in the dtype of `x`.

    Channel of output f, k = 0 for t: `K * f + k` if interleaved, `C * k + f` if planar. Half precision is computed in
    float32. A channels_last input gives a channels_last output; no layout is copied into another unless `x` is neither
    contiguous nor channels-last.

    Raises: ValueError if the channels are no multiple of K.
    """
    dim = dim % x.dim()
    num_inputs = degree + 2
    if x.shape[dim] % num_inputs:
        raise ValueError(f"Bezier of degree {degree} needs a multiple of {num_inputs} channels, got {x.shape[dim]}")
    last = x.movedim(dim, -1)
    if last.is_contiguous() and not x.is_contiguous():
        return bezier(
            last,
            t_activation=t_activation,
            p_activation=p_activation,
            layout=layout,
            dim=-1,
            degree=degree,
            gain=gain,
        ).movedim(-1, dim)
    outer, channels, inner = math.prod(x.shape[:dim]), x.shape[dim] // num_inputs, math.prod(x.shape[dim + 1 :])
    if layout == "planar":
        stacked = x.contiguous().view(outer, num_inputs, channels * inner)
    else:
        stacked = x.contiguous().view(outer * channels, num_inputs, inner)
    y = BezierFunction.apply(stacked, t_activation, p_activation, gain)
    return y.view(*x.shape[:dim], channels, *x.shape[dim + 1 :])


class BezierActivation(nn.Module):
    """The input-based activation: `degree + 2` channels in, one out, no parameters. Source: MODEL.md A1."""

    def __init__(
        self,
        t_activation: PreActivation = "sigmoid",
        p_activation: PreActivation = "silu",
        layout: Layout = "planar",
        dim: int = 1,
        degree: int = 3,
        gain: float = 1.0,
    ):
        super().__init__()
        for name in (t_activation, p_activation):
            if name not in PRE_ACTIVATIONS:
                raise ValueError(f"pre-activation: got {name!r}, expected one of {PRE_ACTIVATIONS}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {LAYOUTS}")
        if degree not in (1, 2, 3):
            raise ValueError(f"degree: got {degree}, expected 1, 2 or 3")
        self.t_activation: PreActivation = t_activation
        self.p_activation: PreActivation = p_activation
        self.layout: Layout = layout
        self.dim, self.degree, self.gain = dim, degree, gain

    @property
    def expansion(self) -> int:
        return self.degree + 2

    def forward(self, x: Tensor) -> Tensor:
        """(..., K*C, ...) to (..., C, ...)."""
        return bezier(
            x,
            t_activation=self.t_activation,
            p_activation=self.p_activation,
            layout=self.layout,
            dim=self.dim,
            degree=self.degree,
            gain=self.gain,
        )

    def extra_repr(self) -> str:
        return (
            f"t={self.t_activation}, p={self.p_activation}, {self.layout}, dim={self.dim}, "
            f"degree={self.degree}, gain={self.gain:g}"
        )


class TrainableBezier(nn.Module):
    """One learned cubic per channel, `t = sigmoid(x)`: the mu, logvar and RGB heads. Source: MODEL.md A1.

    `points` (4, C) start equal for every channel: (-1, -1/3, 1/3, 1) is the straight line 2t - 1.
    """

    def __init__(self, channels: int, points: Sequence[float], dim: int = 1):
        super().__init__()
        if len(points) != 4:
            raise ValueError(f"points: got {len(points)} values, expected the 4 of a cubic")
        self.dim = dim
        self.points = nn.Parameter(torch.tensor(points, dtype=torch.get_default_dtype())[:, None].repeat(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, ...) to the same shape and dtype.

        Written in powers of t (the control points enter once per channel, not once per element), in float32 at least.
        """
        shape = [1] * x.dim()
        shape[self.dim] = -1
        p0, p1, p2, p3 = (p.view(shape) for p in self.points)
        t = torch.sigmoid(x.to(torch.promote_types(x.dtype, self.points.dtype)))
        y = p0 + t * (3 * (p1 - p0) + t * (3 * (p0 - 2 * p1 + p2) + t * (p3 - p0 + 3 * (p1 - p2))))
        return y.to(x.dtype)
