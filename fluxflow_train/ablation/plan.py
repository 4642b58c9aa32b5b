"""What a study compares, as a file that is fixed before its first run: `conf/plans/*.yaml`, or any other by its path.

A plan expands to runs. Each is the ordinary training command with overrides; its name says its place in the plan.
"""

import dataclasses
import itertools
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from fluxflow_train.cli import config_folder
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.protocol import digest

FOLDER = "plans"
MATCHINGS = ("parameters", "flops", "latency", "none")
NAME = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")

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
        """All of it, as plain JSON; `parse` reads it again."""
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


# ---- files ----


def load(name: str) -> Plan:
    """A plan of ours by name, or any other by the path of its file.

    Raises:
        UserError: there is none, or it is not well formed.
    """
    folder = config_folder() / FOLDER
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml" if name in names else Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}, or give a FILE.yaml"
        raise UserError(f"there is no plan {name}: {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"plan={name} can't be read ({reason}): give one of {', '.join(names)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no keys: copy one of conf/{FOLDER}/ and change it")
    return parse({"name": path.stem, **content}, path.name)


def parse(content: dict[str, Any], where: str) -> Plan:
    """Raises UserError, in one line, for what is no plan."""
    plan = _filled(Plan, content, where)
    for what, names in {"arms": plan.arms, "sizes": plan.sizes, "vaes": plan.vaes.arms if plan.vaes else {}}.items():
        for name in names:
            if not set(name) <= NAME:
                raise UserError(f"{where}: {name!r} of {what} must be letters, digits and _: it names folders")
    decision, tuning = plan.decision, plan.tuning
    refused = [
        (plan.candidate not in plan.arms, f"candidate={plan.candidate} is no arm: there are {', '.join(plan.arms)}"),
        (len(plan.arms) < 2, "a comparison wants two arms or more"),
        (not plan.sizes or not plan.seeds, "sizes and seeds must not be empty"),
        (len(set(plan.seeds)) < len(plan.seeds), "seeds must differ"),
        (plan.match not in MATCHINGS, f"match={plan.match}: it is one of {', '.join(MATCHINGS)}"),
        (plan.metric.better not in ("higher", "lower"), "metric.better is higher or lower"),
        (not 0.5 < decision.confidence < 1, "decision.confidence lies between 0.5 and 1"),
        (decision.margin <= 0, "decision.margin is positive"),
        (
            not decision.against or not set(decision.against) <= set(plan.baselines),
            "decision.against names arms of the plan other than the candidate",
        ),
    ]
    if decision.size_ratio is not None:
        refused += [
            (decision.size_ratio <= 0, "decision.size_ratio is positive, or null"),
            (
                len(plan.sizes) < 2 or plan.match == "none",
                "a claim of a size ratio wants two sizes or more, and arms that are matched",
            ),
        ]
    if tuning is not None:
        unknown = [size for size in tuning.sizes if size not in plan.sizes]
        shared = sorted(set(tuning.seeds) & set(plan.seeds))
        refused += [
            (bool(unknown), f"tuning.sizes {', '.join(unknown)} are no sizes of the plan"),
            (not tuning.values or not tuning.sizes, "tuning.values and tuning.sizes must not be empty"),
            (
                tuning.guidance is not None and (plan.vaes is None or not tuning.guidance),
                "tuning.guidance holds scales, in a study of flows; else it is null",
            ),
            (bool(shared), f"tuning.seeds {shared} are compared later: a choice wants seeds of its own"),
        ]
    for is_wrong, message in refused:
        if is_wrong:
            raise UserError(f"{where}: {message}")
    return plan


def _filled(kind: type[Any], content: Any, where: str) -> Any:
    """A dataclass from a dictionary, recursively."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys {', '.join(f.name for f in fields(kind))}, got {content!r}")
    hints = get_type_hints(kind)
    for key in content:
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise UserError(f"{where} has an unknown key {key}: {hint}")
    missing = [key for key in hints if key not in content]
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]}: copy it from one of conf/{FOLDER}/")
    return kind(**{key: _value(hints[key], content[key], f"{where}: {key}") for key in hints})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, of those that a plan is made of."""
    options = get_args(hint)
    if type(None) in options:
        return None if value is None else _value(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _filled(hint, value, where)  # type: ignore[arg-type]
    if getattr(hint, "__origin__", None) is tuple and isinstance(value, list | tuple):
        return tuple(_value(options[0], item, where) for item in value)
    if getattr(hint, "__origin__", None) is dict and isinstance(value, dict):
        return {str(key): _value(options[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    expected = {str: "a text (quoted)", int: "a whole number", float: "a number", bool: "true or false"}
    raise UserError(f"{where}={value!r} must be {expected.get(hint, 'a list' if hint is not dict else 'keys')}")
