"""The Bezier curve and its closed-form gradient, as pure functions of tensors.

K = degree + 2 planes: plane 0 gives t, plane 1 + k gives the control point p_k.
N outer and M inner positions: (N, K, M) in, (N, M) out, whatever the layout of the tensor they were cut from.
Source: Farin 2002, "Curves and surfaces for CAGD", chapter 5 (Bernstein form and its derivative).
"""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, repeat

import torch
from torch import Tensor


def bernstein(t: Tensor, degree: int) -> list[Tensor]:
    """`b_k(t) = binom(n, k) (1 - t)^(n - k) t^k` for k = 0..n, n = degree."""
    one = torch.ones_like(t)
    up = list(accumulate(repeat(t, degree), torch.mul, initial=one))
    down = list(accumulate(repeat(1 - t, degree), torch.mul, initial=one))
    return [math.comb(degree, k) * (down[degree - k] * up[k]) for k in range(degree + 1)]


def curve(t: Tensor, points: Sequence[Tensor]) -> Tensor:
    """`B(t) = sum_k b_k(t) p_k`; for four points `(1-t)^3 p0 + 3(1-t)^2 t p1 + 3(1-t) t^2 p2 + t^3 p3`."""
    terms = [b * p for b, p in zip(bernstein(t, len(points) - 1), points, strict=True)]
    return functools.reduce(torch.add, terms)


def curve_slope(t: Tensor, points: Sequence[Tensor]) -> Tensor:
    """`dB/dt = n sum_k b_k(t) (p_(k+1) - p_k)` with the b_k of degree n - 1."""
    return (len(points) - 1) * curve(t, [b - a for a, b in pairwise(points)])


def pre_activate(name: str, x: Tensor) -> Tensor:
    """The function called `name`: sigmoid, tanh, silu, or none."""
    match name:
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
        case "silu":
            return x * torch.sigmoid(x)
        case _:
            return x


def pre_slope(name: str, x: Tensor) -> Tensor:
    """Derivative of `pre_activate`."""
    match name:
        case "sigmoid":
            s = torch.sigmoid(x)
            return s * (1 - s)
        case "tanh":
            y = torch.tanh(x)
            return 1 - y * y
        case "silu":
            s = torch.sigmoid(x)
            return s * (1 + x * (1 - s))
        case _:
            return torch.ones_like(x)


def widen(x: Tensor) -> Tensor:
    """Half precision is computed in float32, everything else in its own type."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def forward(x: Tensor, t_name: str, p_name: str, gain: float) -> Tensor:
    """(N, K, M) to (N, M), in the dtype of x: `gain * B(f_t(x_t); f_p(x_k))`."""
    t, *points = widen(x).unbind(1)
    y = curve(pre_activate(t_name, t), [pre_activate(p_name, p) for p in points])
    return (gain * y).to(x.dtype)


def backward(x: Tensor, grad: Tensor, t_name: str, p_name: str, gain: float) -> Tensor:
    """Gradient (N, K, M) of `forward` from the gradient (N, M) of its output.

    `dL/dx_t = g B'(t) f_t'(x_t)` and `dL/dx_k = g b_k(t) f_p'(x_k)`, g = gain * grad.
    """
    raw_t, *raw_points = widen(x).unbind(1)
    grad = gain * widen(grad)
    t = pre_activate(t_name, raw_t)
    slope = curve_slope(t, [pre_activate(p_name, p) for p in raw_points])
    basis = bernstein(t, len(raw_points) - 1)
    grads = [grad * slope * pre_slope(t_name, raw_t)]
    grads += [grad * b * pre_slope(p_name, p) for b, p in zip(basis, raw_points, strict=True)]
    return torch.stack(grads, 1).to(x.dtype)
