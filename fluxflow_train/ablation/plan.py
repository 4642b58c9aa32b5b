"""What a study compares, fixed before its first run; see plan_file.py for where it stands.

A plan expands to runs. Each is the ordinary training command with overrides; its name says its place in the plan.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

from fluxflow_train.evaluation.protocol import digest

MATCHINGS = ("parameters", "flops", "latency", "none")

Phase = Literal["vae", "tune", "main"]


@dataclass(frozen=True)
class Metric:
    """A result of the runs' own reports, by its name there.

    Args:
        better: "higher" or "lower".
        split: that the runs are measured on at the end.
    """

    name: str
    label: str
    unit: str
    better: str
    split: str


@dataclass(frozen=True)
class Decision:
    """Fixed before the first run: what counts as which answer.

    Args:
        size_ratio: the claim: every baseline needs so many times the parameters for the same quality. None: no claim,
            the question is whether there is a difference.
        against: the arms that the claim, or the question, is about; the others are controls.
        margin: differences of the metric below it make two arms equal.
        confidence: of all intervals.
    """

    size_ratio: float | None
    against: tuple[str, ...]
    margin: float
    confidence: float


@dataclass(frozen=True)
class Tuning:
    """A grid for one key, the same trials for every arm, measured on the split `tune`; the best mean is taken.

    Args:
        guidance: scales at which every trial of a flow is measured, each with each value: the best pair is taken.
            None leaves the experiment's, as where nothing is drawn.
        sizes: that are tuned; each other size takes the choice of the tuned one nearest in cost.
        seeds: of the trials.
    """

    key: str
    values: tuple[float, ...]
    guidance: tuple[float, ...] | None
    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    budget_images: int


@dataclass(frozen=True)
class VAEs:
    """The VAEs that the flows of a study are trained on, one for each seed: arms by name with their overrides."""

    experiment: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    budget_images: int


@dataclass(frozen=True)
class Plan:
    """`hash` covers everything.

    Args:
        experiment: of every run; overrides: of every run.
        arms: overrides by arm. sizes: overrides by size, of the Bezier arm that all are matched to.
        candidate: the arm whose claim is judged against each of the others.
        match: what the arms are matched by: parameters, flops, latency, none; to `tolerance`.
        seeds: of the runs that are compared, paired over arms.
        metric, decision, tuning, vaes: see there. vaes: a study of flows; tuning: None leaves the rates as they are.
        targets: whether the four rows of the project page's table are measured at the end, for every arm.
    """

    name: str
    question: str
    experiment: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    candidate: str
    sizes: dict[str, tuple[str, ...]]
    match: str
    tolerance: float
    seeds: tuple[int, ...]
    budget_images: int
    vaes: VAEs | None
    tuning: Tuning | None
    metric: Metric
    decision: Decision
    targets: bool

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return digest(self.content)

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as plain JSON; `plan_file.parse` reads it again."""
        return dataclasses.asdict(self)

    @property
    def baselines(self) -> list[str]:
        return [arm for arm in self.arms if arm != self.candidate]


@dataclass(frozen=True)
class Run:
    """One training of a plan.

    Args:
        name: of its folder under `runs/`.
        arm, size: None for a VAE. vae: the arm of the VAE that a flow is trained on.
        value: of the key that is tuned, in a trial.
        needs: the names of the runs that must have finished before.
    """

    name: str
    phase: Phase
    arm: str | None
    size: str | None
    vae: str | None
    seed: int
    value: float | None
    needs: tuple[str, ...]

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the plan, for rows and records."""
        return {key: getattr(self, key) for key in ("phase", "arm", "size", "seed", "vae", "value")}


def expand(plan: Plan) -> list[Run]:
    """All runs: VAEs, trials, then what is compared, seed by seed, so that a study cut short is balanced."""
    runs: list[Run] = []
    vaes: list[str | None] = [None] if plan.vaes is None else list(plan.vaes.arms)

    def vae_run(vae: str | None, seed: int) -> tuple[str, ...]:
        return () if vae is None else (f"vae/{vae}-seed{seed}",)

    tuning = plan.tuning
    trial_seeds = () if tuning is None else tuning.seeds
    for vae, seed in itertools.product(vaes, (*plan.seeds, *trial_seeds)):
        # Trials are made on the first VAE alone.
        if vae is not None and (seed in plan.seeds or vae == vaes[0]) and vae_run(vae, seed)[0] not in _names(runs):
            runs.append(Run(vae_run(vae, seed)[0], "vae", None, None, vae, seed, None, ()))
    if tuning is not None:
        for size, value, seed, arm in itertools.product(tuning.sizes, tuning.values, tuning.seeds, plan.arms):
            name = f"tune/{arm}-{size}-{value:g}-seed{seed}"
            runs.append(Run(name, "tune", arm, size, vaes[0], seed, value, vae_run(vaes[0], seed)))
    for seed, size, vae, arm in itertools.product(plan.seeds, plan.sizes, vaes, plan.arms):
        name = "-".join(part for part in (f"main/{arm}", size, vae and f"on_{vae}", f"seed{seed}") if part)
        trials = tuple(run.name for run in runs if run.phase == "tune" and run.arm == arm)
        runs.append(Run(name, "main", arm, size, vae, seed, None, (*vae_run(vae, seed), *trials)))
    return runs


def _names(runs: list[Run]) -> set[str]:
    return {run.name for run in runs}
