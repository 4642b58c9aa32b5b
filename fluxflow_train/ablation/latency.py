"""Widths of equal measured speed. A time, unlike a count, is never twice equal: both are measured in turn."""

import statistics
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fluxflow_train.ablation.cost import Inputs, parameters, timed_forward
from fluxflow_train.ablation.matching import Build, Match, Steps, Widths, rounded
from fluxflow_train.errors import UserError

BISECTIONS = 9  # of the multiplier, between 1/8 and 8
ROUNDS = 5  # of measuring both networks in turn; the median of the quotients counts
CONFIRMATIONS = 15


def match_latency(
    build: Build,
    reference: nn.Module,
    *,
    widths: Mapping[str, list[int]],
    inputs: Inputs,
    tolerance: float,
    steps: Steps,
    ratio: float,
    device: str,
) -> Match:
    """One multiplier for all lists of `widths`, so that an image's forward takes `ratio` times the reference's time.

    Args: as of `matching.match`; steps: by component, what its widths are multiples of. `device`: where it is measured.

    Returns: `residuals` has "total" alone, the relative difference of the seconds, confirmed after the search.

    Raises:
        UserError: the nearest widths are not within `tolerance`; the message says the best residual.
    """

    def scaled(multiplier: float) -> Widths:
        return {name: rounded(multiplier * np.array(shape), steps[name]).tolist() for name, shape in widths.items()}

    def network(candidate: Widths) -> nn.Module:
        with torch.device("meta"):
            return build(**candidate)

    def quotient(candidate: Widths, rounds: int) -> float:
        ours, theirs = (timed_forward(net, inputs, device) for net in (network(candidate), reference))
        return statistics.median(ours() / theirs() for _ in range(rounds)) / ratio

    low, high = 1 / 8, 8.0
    seen: dict[str, tuple[float, Widths]] = {}
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        candidate = scaled(middle)
        if str(candidate) not in seen:
            seen[str(candidate)] = quotient(candidate, ROUNDS), candidate
        low, high = (middle, high) if seen[str(candidate)][0] < 1 else (low, middle)
    nearest = sorted(seen.values(), key=lambda found: abs(np.log(found[0])))[:2]
    confirmed = [(quotient(candidate, CONFIRMATIONS) - 1, candidate) for _, candidate in nearest]
    residual, best = min(confirmed, key=lambda found: abs(found[0]))
    if not abs(residual) < tolerance:
        total = parameters(network(best))["total"]
        raise UserError(
            f"no widths bring the latency on {device} within {tolerance:.2%} of the reference's (nearest: {best}, "
            f"{residual:+.2%}, {total:,} parameters): allow a larger tolerance, or measure on a quieter machine"
        )
    return Match(best, network(best), {"total": residual})
