"""From a study's ledger alone to the dictionary that its report is rendered from (schema study_report/v1)."""

from typing import Any

from fluxflow_train.ablation import tuning
from fluxflow_train.ablation.answer import answer
from fluxflow_train.ablation.comparisons import cells, comparisons, factorial, rate_distortions, ratios
from fluxflow_train.ablation.frozen import read
from fluxflow_train.ablation.history import failures, run_row, trials_row
from fluxflow_train.ablation.ledger import Event, Ledger
from fluxflow_train.ablation.overview import curves, health, pictures, provenance, targets, warnings
from fluxflow_train.ablation.results import Results, gathered
from fluxflow_train.errors import UserError

SCHEMA = "study_report/v1"


def analyse(ledger: Ledger, command: str) -> dict[str, Any]:
    """The report of what has finished so far.

    Raises:
        UserError: there is no ledger of a study.
    """
    frozen = read(ledger)
    if frozen is None:
        raise UserError(f"{ledger.path} is no ledger of a study: give the folder that study made")
    events = ledger.events()
    finished = {event.run: event.record for event in events if event.event == "finished" and event.run}
    plan = frozen.plan
    results = gathered(frozen, finished)
    trials = {name: tuning.outcomes(plan, r) for name, r in finished.items() if r["phase"] == "tune"}
    measured = {event.run: event.record for event in events if event.event == "measured" and event.run}
    chosen = tuning.choose(plan, trials, fixed_choices(events))
    runs = [run_row(frozen, run, events, finished.get(run.name)) for run in frozen.runs]
    counts = {state: sum(row["status"] == state for row in runs) for state in ("finished", "failed", "pending")}
    compared = comparisons(results)
    report = {
        "schema": SCHEMA,
        "kind": "study",
        "study": plan.name,
        "question": plan.question,
        "status": "complete"
        if all(row["status"] == "finished" for row in runs if row["phase"] != "tune")
        else "partial",
        "counts": {"planned": len(runs), **counts, "attempts": sum(event.event == "begun" for event in events)},
        "metric": plan.content["metric"],
        "confidence": plan.decision.confidence,
        "candidate": plan.candidate,
        "axis": {"label": frozen.origin["axis"], "unit": ""},
        "arms": [arm_row(results, arm, chosen) for arm in plan.arms],
        "sizes": [{"name": size, "cost": frozen.cost(size)} for size in results.sizes],
        "vaes": [vae for vae in results.vaes if vae is not None],
        "cells": cells(results, chosen),
        "comparisons": compared,
        "ratios": ratios(results),
        "rate_distortion": rate_distortions(results),
        "factorial": factorial(results, compared),
        "tuning": [trials_row(frozen, curve) for curve in chosen],
        "curves": curves(results),
        "health": health(results),
        "pictures": pictures(results),
        "targets": targets(frozen, measured),
        "failures": failures(events),
        "runs": runs,
        "provenance": provenance(frozen, finished, ledger.path.name, command),
    }
    report["answer"] = answer(report, plan)
    report["warnings"] = warnings(report, finished, plan)
    return report


def fixed_choices(events: list[Event]) -> dict[str, tuning.Choice]:
    return {
        event.run: tuning.Choice(event.record["value"], event.record["guidance"])
        for event in events
        if event.event == "chosen" and event.run
    }


def arm_row(results: Results, arm: str, chosen: list[tuning.Curve]) -> dict[str, Any]:
    """What makes an arm, and what it was tuned to at each size."""
    plan, frozen = results.frozen.plan, results.frozen
    choices = {size: tuning.chosen(chosen, arm, frozen.tuned_size(size)) for size in results.sizes}
    known = {size: choice for size, choice in choices.items() if choice is not None}
    return {
        "name": arm,
        "is_candidate": arm == plan.candidate,
        "overrides": list(plan.arms[arm]),
        "learning_rates": {size: choice.value for size, choice in known.items()},
    }
