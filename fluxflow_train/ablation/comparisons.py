"""What a study compares: cells, paired differences, size ratios, quality at equal rate, the factorial.

Signs: a difference is positive where the candidate is better, whichever way the metric points.
"""

import itertools
import math

import numpy as np

from fluxflow_train.ablation import statistics, tuning
from fluxflow_train.ablation.plan import Decision
from fluxflow_train.ablation.power import pairs_needed
from fluxflow_train.ablation.rate_distortion import rate_distortion, rates_agree
from fluxflow_train.ablation.results import Record, Results, finite
from fluxflow_train.ablation.size_ratio import SizeRatio, size_ratio


def cells(results: Results, chosen: list[tuning.Curve]) -> list[Record]:
    """Every arm at every size on every VAE: its mean over seeds with the interval, and what it costs."""
    frozen, found = results.frozen, []
    for size, vae, arm in itertools.product(results.sizes, results.vaes, frozen.plan.arms):
        seeds = results.seeds([arm], [size], [vae])
        choice = tuning.chosen(chosen, arm, frozen.tuned_size(size))
        network, records = frozen.networks[arm][size], [results.records[arm, size, vae, seed] for seed in seeds]
        values = [record["metric"] for record in records]
        interval = statistics.mean_interval(values, frozen.plan.decision.confidence) if values else None
        found.append(
            {
                "arm": arm,
                "size": size,
                "vae": vae,
                "n": len(seeds),
                "mean": interval and interval.estimate,
                "low": finite(interval and interval.low),
                "high": finite(interval and interval.high),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "parameters": network["parameters"],
                "flops": network["flops"],
                "activation_bytes": network["activation_bytes"],
                "residual": network["residual"],
                "cost": network["cost"],
                "learning_rate": choice and choice.value,
                "guidance": choice and choice.guidance,
                **{key: mean_of(records, key) for key in ("seconds", "memory_mib", "rate_nats")},
                "images_per_second": mean_of(records, "images_seen", per="seconds"),
                "runs": [results.names[arm, size, vae, seed] for seed in seeds],
            }
        )
    return found


def mean_of(records: list[Record], key: str, per: str | None = None) -> float | None:
    values = [record[key] / (record[per] if per else 1) for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def pairs(results: Results) -> list[tuple[str, str | None]]:
    """Each baseline the candidate is held against, on each VAE."""
    return list(itertools.product(results.frozen.plan.baselines, results.vaes))


def comparisons(results: Results) -> list[Record]:
    """Paired differences over seeds: of the mean over all sizes, then size by size.

    Holm within each of the two, apart for the arms that the decision is about and for the controls.
    """
    rows = []
    scopes: list[str | None] = [None, *results.sizes] if len(results.sizes) > 1 else [None]
    for scope in scopes:
        sizes = results.sizes if scope is None else [scope]
        for baseline, vae in pairs(results):
            rows.append(compare(results, baseline, vae, scope, sizes))
    places = sorted({(row["size"] is None, row["claimed"]) for row in rows})
    for family in ([row for row in rows if (row["size"] is None, row["claimed"]) == place] for place in places):
        p_values = [float("nan") if row["p"] is None else row["p"] for row in family]
        for row, adjusted in zip(family, statistics.holm(p_values).tolist() if family else [], strict=True):
            row["p_holm"] = finite(adjusted)
            row["verdict"] = verdict(row, results.frozen.plan.decision.confidence)
    return rows


def compare(results: Results, baseline: str, vae: str | None, scope: str | None, sizes: list[str]) -> Record:
    plan = results.frozen.plan
    seeds = results.seeds([plan.candidate, baseline], sizes, [vae])
    row: Record = {"arm": plan.candidate, "baseline": baseline, "size": scope, "vae": vae, "n": len(seeds)}
    row["claimed"] = baseline in plan.decision.against
    row |= {"margin": plan.decision.margin, "p_holm": None, "verdict": "no data"}
    names = ("difference", "low", "high", "p", "correlation", "detectable", "needed", "equivalent", "p_equivalent")
    if not seeds:
        return row | dict.fromkeys((*names, "rates_agree"))
    ours, theirs = (results.quality(arm, sizes, vae, seeds).mean(1) for arm in (plan.candidate, baseline))
    paired = statistics.paired_difference(ours, theirs, plan.decision.confidence)
    equal = statistics.equivalence(ours, theirs, plan.decision.margin, 1 - plan.decision.confidence)
    values = (paired.difference, paired.low, paired.high, paired.p_value, paired.correlation)
    values += (paired.minimum_detectable_effect, seeds_needed(paired.sd, plan.decision))
    row |= dict(zip(names, map(finite, values), strict=False))
    row |= {"equivalent": bool(equal.equivalent), "p_equivalent": finite(equal.p_value)}
    return row | {"rates_agree": agreement(results, baseline, vae, sizes, seeds)}


def seeds_needed(sd: float, decision: Decision) -> float | None:
    """How many seeds would see a difference of the margin, with the spread that these have."""
    return float(pairs_needed(sd, decision.margin, 1 - decision.confidence)) if sd > 0 else None


def agreement(results: Results, baseline: str, vae: str | None, sizes: list[str], seeds: list[int]) -> bool | None:
    """Whether the two arms' rates agree; None where the metric has none."""
    arms = (results.frozen.plan.candidate, baseline)
    if any(results.records[arm, size, vae, s]["rate_nats"] is None for arm in arms for size in sizes for s in seeds):
        return None
    ours, theirs = (results.quality(arm, sizes, vae, seeds, "rate_nats") for arm in arms)
    if min(ours.min(), theirs.min()) <= 0:  # a posterior that has collapsed
        return False
    return bool(rates_agree(ours, theirs))


def verdict(row: Record, confidence: float) -> str:
    """equal where it is within the margin, also if told from 0; better or worse by Holm's p; else undecided."""
    if row["n"] == 0:
        return "no data"
    if row["equivalent"]:
        return "equal"
    if row["p_holm"] is not None and row["p_holm"] < 1 - confidence:
        return "better" if row["difference"] > 0 else "worse"
    return "undecided"


def ratios(results: Results) -> list[Record]:
    """How many times the cost each baseline needs for the candidate's quality."""
    plan, sizes, found = results.frozen.plan, results.sizes, []
    if len(sizes) < 2 or plan.match == "none":
        return []
    costs = np.array([results.frozen.cost(size) for size in sizes])
    for baseline, vae in pairs(results):
        seeds = results.seeds([plan.candidate, baseline], sizes, [vae])
        if not seeds:
            continue
        ours, theirs = (results.quality(arm, sizes, vae, seeds) for arm in (plan.candidate, baseline))
        ratio = size_ratio(ours, theirs, costs, plan.decision.confidence)
        # Refuting one of several baselines is one of several chances to err; supporting against all of them is not.
        chances = len(plan.decision.against) * len(results.vaes)
        strict = size_ratio(ours, theirs, costs, 1 - (1 - plan.decision.confidence) / chances)
        lines = []
        for arm, start in ((plan.candidate, ratio.intercept_a), (baseline, ratio.intercept_b)):
            nets = [results.frozen.networks[arm][size] for size in (sizes[0], sizes[-1])]
            ends = [net["cost"] for net in nets]  # where the arm is drawn; the fit is over what it was matched to
            y = [start + ratio.slope.estimate * math.log(net["reference_cost"]) for net in nets]
            lines.append({"arm": arm, "x": ends, "y": [results.sign * value for value in y]})
        found.append(
            {
                "arm": plan.candidate,
                "baseline": baseline,
                "vae": vae,
                "n": len(seeds),
                "lost": len(plan.seeds) - len(seeds),
                "ratio": finite(ratio.ratio),
                "low": finite(ratio.low),
                "high": finite(ratio.high),
                "high_simultaneous": finite(strict.high) if strict.bounded else None,
                "bounded": bool(ratio.bounded),
                "claimed": baseline in plan.decision.against,
                "note": ratio_note(ratio),
                "slope": finite(ratio.slope.estimate),
                "slope_low": finite(ratio.slope.low),
                "slope_high": finite(ratio.slope.high),
                "lines": lines,
                "curvature": interval_of(ratio.curvature),
                "slope_difference": interval_of(ratio.slope_difference),
            }
        )
    return found


def ratio_note(ratio: SizeRatio) -> str:
    """Why a ratio has no bounds, and what is ruled out all the same."""
    if ratio.excluded is None:
        return ratio.explanation
    low, high = (math.exp(min(value, 700.0)) for value in ratio.excluded)
    return f"{ratio.explanation}; ratios between {low:.3g} and {high:.3g} are ruled out"


def rate_distortions(results: Results) -> list[Record]:
    """The distance between the arms' curves of quality against rate over the sizes, where rates are known."""
    plan, sizes, found = results.frozen.plan, results.sizes, []
    for baseline, vae in pairs(results):
        seeds = results.seeds([plan.candidate, baseline], sizes, [vae])
        if len(sizes) < 2 or not seeds or agreement(results, baseline, vae, sizes, seeds) is not False:
            continue
        (ours, our_rate), (theirs, their_rate) = (
            [results.quality(arm, sizes, vae, seeds, key) for key in ("metric", "rate_nats")]
            for arm in (plan.candidate, baseline)
        )
        place = {"arm": plan.candidate, "baseline": baseline, "vae": vae}
        try:
            distance = rate_distortion(ours, our_rate, theirs, their_rate, plan.decision.confidence)
        except ValueError as error:  # no curve: a rate of 0, or one rate at two sizes
            found.append({**place, "n": 0, "difference": None, "low": None, "high": None, "note": str(error)})
            continue
        found.append(
            {**place, "n": distance.num_seeds}
            | {key: finite(getattr(distance, key)) for key in ("difference", "low", "high")}
            | {"note": distance.explanation}
        )
    return found


def factorial(results: Results, compared: list[Record]) -> Record | None:
    """{candidate, baseline} VAE x {candidate, baseline} flow at the largest size; both flows on a third, common VAE."""
    plan = results.frozen.plan
    if plan.vaes is None:
        return None
    arms = [arm for arm in plan.arms if arm in plan.vaes.arms]
    if plan.candidate not in arms or len(arms) < 2:
        return None
    arms = [plan.candidate, next(arm for arm in arms if arm != plan.candidate)]
    size, vaes = results.sizes[-1], list[str | None](arms)
    seeds = results.seeds(arms, [size], vaes)
    if not seeds:
        return None
    values = np.array([[results.quality(flow, [size], vae, seeds)[:, 0] for flow in arms] for vae in vaes])
    found = statistics.factorial(values, plan.decision.confidence)
    contrasts = {
        "vae": (f"VAE: {arms[0]} instead of {arms[1]}", found.vae),
        "flow": (f"flow: {arms[0]} instead of {arms[1]}", found.flow),
        "interaction": ("interaction: what both together add", found.interaction),
    }
    common = [vae for vae in plan.vaes.arms if vae not in arms]
    return {
        "vae_arms": arms,
        "flow_arms": arms,
        "size": size,
        "n": len(seeds),
        "effects": [
            {"name": name, "label": label, "difference": finite(effect.estimate), "low": finite(effect.low)}
            | {"high": finite(effect.high), "p": finite(effect.p_value)}
            for name, (label, effect) in contrasts.items()
        ],
        "cells": (results.sign * values.mean(-1)).tolist(),
        "common": next(
            (row for row in compared if common and (row["baseline"], row["vae"]) == (arms[1], common[0])), None
        ),
    }


def interval_of(effect: statistics.Contrast | None) -> Record | None:
    if effect is None:
        return None
    return {"estimate": finite(effect.estimate), "low": finite(effect.low), "high": finite(effect.high)}
