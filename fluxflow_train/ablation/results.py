"""The finished runs that a study compares, by their place in the plan.

S seeds, K sizes.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from fluxflow_train.ablation.frozen import Frozen

Record = dict[str, Any]


class Results(NamedTuple):
    """The finished runs that are compared, by (arm, size, vae, seed); `sign` makes higher the better."""

    frozen: Frozen
    records: dict[tuple[str, str, str | None, int], Record]
    names: dict[tuple[str, str, str | None, int], str]
    sign: float

    @property
    def vaes(self) -> list[str | None]:
        plan = self.frozen.plan
        return [None] if plan.vaes is None else list(plan.vaes.arms)

    @property
    def sizes(self) -> list[str]:
        """Ascending by cost."""
        return sorted(self.frozen.plan.sizes, key=self.frozen.cost)

    def seeds(self, arms: list[str], sizes: list[str], vaes: list[str | None]) -> list[int]:
        """The seeds for which all of these finished."""
        wanted = list(itertools.product(arms, sizes, vaes))
        return [s for s in self.frozen.plan.seeds if all((*cell, s) in self.records for cell in wanted)]

    def quality(self, arm: str, sizes: list[str], vae: str | None, seeds: list[int], key: str = "metric") -> np.ndarray:
        """(S, K), higher is better."""
        sign = self.sign if key == "metric" else 1.0
        return np.array([[sign * self.records[arm, size, vae, seed][key] for size in sizes] for seed in seeds])


def gathered(frozen: Frozen, finished: dict[str, Record]) -> Results:
    """Of all records of finished runs, by name, those to compare."""
    places = {
        (run.arm or "", run.size or "", run.vae, run.seed): run.name
        for run in frozen.runs
        if run.phase == "main" and run.name in finished
    }
    records = {place: finished[name] for place, name in places.items()}
    return Results(frozen, records, places, 1.0 if frozen.plan.metric.better == "higher" else -1.0)


def finite(value: float | None) -> float | None:
    """JSON has no infinity: what is not finite is null."""
    return None if value is None or not np.isfinite(value) else float(value)
