"""The widths that make another network as large as the reference, so that two arms are compared at equal cost.

The counts of convolutional networks, parameters and FLOPs alike, are quadratic polynomials in the widths. So a few
builds on the meta device give the polynomial, the polynomial ranks every choice of widths near the right multiple of
the list asked for, and one more build confirms the choice.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from fluxflow_train.ablation.cost import Inputs, flops, parameters
from fluxflow_train.errors import UserError

Build = Callable[..., nn.Module]
Widths = dict[str, list[int]]
Steps = Mapping[str, np.ndarray]  # by component: what its widths are multiples of, one for all or one for each

ROUNDS = 4  # polynomial, choice, confirmation: one round is enough if the count is quadratic
FREE_ENTRIES = 6  # only the last entries of a long list move on their own
MAX_CANDIDATES = 20_000  # this many lists are ranked, so entries of a short list move further
FARTHEST = 64  # steps that one entry moves


class Match(NamedTuple):
    """`widths` of `network` (on the meta device), and its relative differences by component and in "total"."""

    widths: Widths
    network: nn.Module
    residuals: dict[str, float]


def match(
    build: Build,
    reference: nn.Module,
    *,
    widths: Mapping[str, list[int]],
    inputs: Inputs,
    by: Literal["parameters", "flops"] = "parameters",
    tolerance: float = 0.01,
    granularity: int | Mapping[str, list[int]] = 4,
    ratio: float = 1.0,
) -> Match:
    """Scale each list of `widths` until its component costs `ratio` times the reference's, within `tolerance`.

    Args:
        build: `build(**widths)`; the list called "encoder" sizes the child `encoder`, and no other child.
        reference: on the meta device, with children of the same names.
        widths: the shapes to scale. Each list gets a multiplier of its own; where no multiple of the whole list comes
            near enough, entries move on their own. Of all lists within `tolerance` the one nearest to a multiple of the
            shape is taken.
        inputs: see `cost`; read for FLOPs only.
        granularity: every width is a multiple of it, or each of its own one. GroupNorm's number of groups is the
            largest divisor of the width up to a limit: with a limit of 32, one group of 47 channels but 24 of 48. So
            free widths would make the arms differ in more than the activation; a multiple of the limit gives every
            layer of both the same number. The width of an attention is a multiple of 4 times its heads.

    Raises:
        UserError: no widths within `tolerance`; the message says the best residual.
        ValueError: a list names no component of the reference.
    """
    count = {"parameters": parameters, "flops": lambda network: flops(network, inputs)}[by]
    targets: dict[str, float] = dict(count(reference))
    if not set(widths) <= set(targets):
        raise ValueError(f"got widths of {sorted(widths)}, expected some of the components {sorted(targets)}")
    for name in widths:
        targets["total"] += (ratio - 1) * targets[name]
        targets[name] *= ratio
    steps = {name: np.array(granularity if isinstance(granularity, int) else granularity[name]) for name in widths}
    build_on_meta = _on_meta(build)
    best = _search(lambda candidate: count(build_on_meta(**candidate)), widths, targets, tolerance, steps)
    network = build_on_meta(**best)
    residuals = {name: value / targets[name] - 1 for name, value in count(network).items() if targets[name]}
    for name in [*widths, "total"]:
        if not abs(residuals[name]) < tolerance:
            raise UserError(
                f"no widths in multiples of {steps.get(name, granularity)} bring the {by} of {name} within "
                f"{tolerance:.2%} of the reference's (nearest: {best.get(name, best)}, {residuals[name]:+.2%}): "
                "allow a larger tolerance, a smaller granularity, or other starting widths"
            )
    return Match(best, network, residuals)


def _search(
    counted: Callable[[Widths], dict[str, int]],
    shapes: Mapping[str, list[int]],
    targets: dict[str, float],
    tolerance: float,
    steps: Steps,
) -> Widths:
    """The best widths found; a count that is not quadratic is approached by fitting anew around each choice."""
    center = {name: rounded(np.array(shape), steps[name]) for name, shape in shapes.items()}
    best, error = _lists(center), dict.fromkeys(shapes, np.inf)
    for _ in range(ROUNDS):  # to the right scale first, since a polynomial is only as good as it is near
        counts = counted(_lists(center))
        for name, w in center.items():
            center[name] = rounded(w * (targets[name] / counts[name]) ** 0.5, steps[name])
    for _ in range(ROUNDS):
        for name, polynomial in _fit(counted, center, steps).items():
            center[name] = _nearest(polynomial, np.array(shapes[name]), targets[name], tolerance, steps[name])
        counts = counted(_lists(center))
        for name in shapes:
            residual = abs(counts[name] / targets[name] - 1)
            if residual < error[name]:
                best[name], error[name] = _lists(center)[name], residual
        if max(error.values()) < tolerance:
            break
    return best


def _lists(widths: dict[str, np.ndarray]) -> Widths:
    return {name: w.tolist() for name, w in widths.items()}


def _on_meta(build: Build) -> Build:
    def build_on_meta(**widths: list[int]) -> nn.Module:
        with torch.device("meta"):
            return build(**widths)

    return build_on_meta


def rounded(widths: np.ndarray, granularity: np.ndarray) -> np.ndarray:
    return np.maximum(np.rint(widths / granularity), 1).astype(np.int64) * granularity


class _Quadratic(NamedTuple):
    """Newton's form about `center` with steps `step`: exact at the widths it was fitted to, integers throughout."""

    center: np.ndarray  # (n,)
    step: np.ndarray  # (n,)
    constant: float
    linear: np.ndarray  # (n,) first differences
    second: np.ndarray  # (n, n) second differences, symmetric

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """(..., n) widths to (...) counts: sum_i u_i d_i + sum_i u_i (u_i - 1) / 2 d_ii + sum_(i<j) u_i u_j d_ij."""
        u = (widths - self.center) / self.step
        pairs = np.einsum("...i,ij,...j->...", u, self.second, u) - u @ np.diag(self.second)
        return self.constant + u @ self.linear + pairs / 2


def _fit(
    counted: Callable[[Widths], dict[str, int]], center: dict[str, np.ndarray], steps: Steps
) -> dict[str, _Quadratic]:
    """The polynomial of each component. All components move in the same builds, since each depends on its own list."""
    longest = max(len(w) for w in center.values())
    moves = [(), *((i,) for i in range(longest)), *itertools.combinations_with_replacement(range(longest), 2)]
    values: dict[tuple[int, ...], dict[str, int]] = {}
    for move in moves:
        candidate = {name: w.copy() for name, w in center.items()}
        for name, w in candidate.items():
            for i in move:
                if i < len(w):
                    w[i] += np.broadcast_to(steps[name], len(w))[i]
        values[move] = counted(_lists(candidate))
    polynomials = {}
    for name, w in center.items():
        n = len(w)
        constant = values[()][name]
        linear = np.array([values[(i,)][name] - constant for i in range(n)], dtype=float)
        second = np.zeros((n, n))
        for i, j in itertools.combinations_with_replacement(range(n), 2):
            second[i, j] = second[j, i] = values[(i, j)][name] - constant - linear[i] - linear[j]
        polynomials[name] = _Quadratic(w.copy(), np.broadcast_to(steps[name], n), constant, linear, second)
    return polynomials


def _nearest(
    count: _Quadratic, shape: np.ndarray, target: float, tolerance: float, granularity: np.ndarray
) -> np.ndarray:
    """Of the widths within `tolerance` of `target` the nearest to a multiple of `shape`; else the least residual."""
    low, high = 0.0, 1.0
    while count(high * shape) < target and high < 2**20:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle * shape) < target else (low, middle)
    exact = high * shape
    free = min(len(shape), FREE_ENTRIES)
    reach = min(int((MAX_CANDIDATES ** (1 / free) - 1) / 2), FARTHEST)
    offsets = np.array(list(itertools.product(range(-reach, reach + 1), repeat=free)))
    offsets = np.pad(offsets, ((0, 0), (len(shape) - free, 0)))
    candidates = np.maximum(rounded(exact, granularity) + granularity * offsets, granularity)
    residual = np.abs(count(candidates) / target - 1)
    distance = np.square(candidates / exact - 1).sum(-1)
    within = residual < tolerance
    return candidates[np.where(within, distance, np.inf).argmin() if within.any() else residual.argmin()]
