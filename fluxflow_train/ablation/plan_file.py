"""A plan from its file, `conf/plans/*.yaml` or any other by its path; what is no plan gets one line."""

import dataclasses
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fluxflow_train.ablation.plan import MATCHINGS, Plan
from fluxflow_train.cli import config_folder
from fluxflow_train.data.sources import SPLITS
from fluxflow_train.errors import UserError

FOLDER = "plans"
NAME = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


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
        (plan.metric.split not in SPLITS, f"metric.split={plan.metric.split}: it is one of {', '.join(SPLITS)}"),
        (not plan.tolerance > 0, "tolerance is positive"),
        (plan.budget_images < 1, "budget_images is positive"),
        (plan.vaes is not None and not plan.vaes.arms, "vaes.arms must not be empty"),
        (plan.metric.better not in ("higher", "lower"), "metric.better is higher or lower"),
        (not 0.5 < decision.confidence < 1, "decision.confidence lies between 0.5 and 1"),
        (not decision.margin > 0, "decision.margin is positive"),
        (len(set(decision.against)) < len(decision.against), "decision.against names an arm twice"),
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
            (
                not tuning.values or not tuning.sizes or not tuning.seeds,
                "tuning.values, tuning.sizes and tuning.seeds must not be empty",
            ),
            (
                any(len(set(each)) < len(each) for each in (tuning.sizes, tuning.seeds, tuning.guidance or ()))
                or len({f"{value:g}" for value in tuning.values}) < len(tuning.values),
                "tuning.values (to six digits), sizes, seeds and guidance must differ",
            ),
            (tuning.budget_images < 1, "tuning.budget_images is positive"),
            (
                tuning.guidance is not None and (plan.vaes is None or not tuning.guidance),
                "tuning.guidance holds scales, in a study of flows; else it is null",
            ),
            (
                tuning.guidance is not None and not plan.metric.name.startswith(("kid", "frechet")),
                f"metric.name={plan.metric.name} does not depend on guidance: tuning.guidance wants kid, or is null",
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
