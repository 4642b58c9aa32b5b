"""The tuned value of each arm: the best mean of equally many trials on the split `tune`."""

from collections.abc import Mapping
from typing import NamedTuple

from fluxflow_train.ablation.plan import Plan, expand


class Point(NamedTuple):
    """The finished trials of one value: their results, and the runs by name."""

    value: float
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
    chosen: float | None

    @property
    def at_edge(self) -> bool:
        """Whether a value beyond the grid might have been better."""
        values = [point.value for point in self.points]
        return self.chosen is not None and len(values) > 1 and self.chosen in (min(values), max(values))


def key_of(arm: str, size: str | None) -> str:
    """What a choice stands under in the ledger."""
    return f"{arm}-{size}"


def choose(plan: Plan, results: Mapping[str, float], fixed: Mapping[str, float]) -> list[Curve]:
    """For every arm and tuned size, the value with the best mean; of equal ones the smallest.

    A value counts where all its trials finished: one that diverges for a seed is no choice.

    Args:
        results: the metric by the name of the run, of the trials that have one.
        fixed: what has been chosen, by `key_of`: a trial that succeeds later changes nothing.
    """
    if plan.tuning is None:
        return []
    trials = [run for run in expand(plan) if run.phase == "tune"]
    curves = []
    for arm in plan.arms:
        for size in plan.tuning.sizes:
            points = []
            for value in sorted(plan.tuning.values):
                runs = [r.name for r in trials if (r.arm, r.size, r.value) == (arm, size, value) and r.name in results]
                points.append(Point(value, [results[name] for name in runs], runs))
            complete = [point for point in points if len(point.results) == len(plan.tuning.seeds)]
            sign = 1 if plan.metric.better == "lower" else -1
            best = min(complete, key=lambda point: (sign * (point.mean or 0.0), point.value), default=None)
            curves.append(Curve(arm, size, points, fixed.get(key_of(arm, size), best and best.value)))
    return curves


def chosen(curves: list[Curve], arm: str, size: str | None) -> float | None:
    """The value of `arm` at a tuned size."""
    return next((curve.chosen for curve in curves if (curve.arm, curve.size) == (arm, size)), None)
