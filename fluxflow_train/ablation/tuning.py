"""What is tuned for each arm: the best mean of equally many trials on the split `tune`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fluxflow_train.ablation.plan import Plan, expand

Outcomes = Mapping[float | None, float]
"""The metric of one trial by guidance scale; under None where the plan leaves guidance as it is."""


class Choice(NamedTuple):
    """What the runs of an arm that are compared take: the tuned key's value, and the guidance where it is tuned."""

    value: float
    guidance: float | None


class Point(NamedTuple):
    """The finished trials of one choice: their results, and the runs by name."""

    choice: Choice
    results: list[float]
    runs: list[str]

    @property
    def mean(self) -> float | None:
        return sum(self.results) / len(self.results) if self.results else None


class Curve(NamedTuple):
    """The sensitivity of an arm at a size. `chosen` is None where no trial has a result; see `choose`."""

    arm: str
    size: str
    points: list[Point]
    chosen: Choice | None

    @property
    def edges(self) -> list[float]:
        """What was chosen at an end of its grid, so that something beyond might have been better."""
        found = []
        for axis, value in enumerate(self.chosen or ()):
            grid = {point.choice[axis] or 0.0 for point in self.points}
            if value is not None and len(grid) > 1 and value in (min(grid), max(grid)):
                found.append(value)
        return found


def key_of(arm: str, size: str | None) -> str:
    """What a choice stands under in the ledger."""
    return f"{arm}-{size}"


def outcomes(plan: Plan, record: Mapping[str, Any]) -> dict[float | None, float]:
    """Of a finished trial, from what the ledger keeps of it."""
    if plan.tuning is None or plan.tuning.guidance is None:
        return {None: record["metric"]}
    return {scale: metric for scale, metric in record["swept"]}


def choose(plan: Plan, trials: Mapping[str, Outcomes], fixed: Mapping[str, Choice]) -> list[Curve]:
    """For every arm and tuned size, the choice with the best mean; of equal ones the smallest.

    It counts where all its trials finished: a value that diverges for a seed is no choice.

    Args:
        trials: by the name of the run, those that have results.
        fixed: what has been chosen, by `key_of`: a trial that succeeds later changes nothing.
    """
    if plan.tuning is None:
        return []
    runs = [run for run in expand(plan) if run.phase == "tune" and run.name in trials]
    sign = 1 if plan.metric.better == "lower" else -1
    grid = [Choice(v, g) for v in sorted(plan.tuning.values) for g in sorted(plan.tuning.guidance or ()) or [None]]
    curves = []
    for arm in plan.arms:
        for size in plan.tuning.sizes:
            points = []
            for choice in grid:
                names = [run.name for run in runs if (run.arm, run.size, run.value) == (arm, size, choice.value)]
                names = [name for name in names if choice.guidance in trials[name]]
                points.append(Point(choice, [trials[name][choice.guidance] for name in names], names))
            complete = [point for point in points if len(point.results) == len(plan.tuning.seeds)]
            best = min(complete, key=lambda point: (sign * (point.mean or 0.0), *point.choice), default=None)
            curves.append(Curve(arm, size, points, fixed.get(key_of(arm, size), best and best.choice)))
    return curves


def chosen(curves: list[Curve], arm: str, size: str | None) -> Choice | None:
    """The choice of `arm` at a tuned size."""
    return next((curve.chosen for curve in curves if (curve.arm, curve.size) == (arm, size)), None)
