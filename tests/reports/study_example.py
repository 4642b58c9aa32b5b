"""Dictionaries as the analysis of a ledger makes them: a whole study, and one in which nothing has finished."""

import random
from typing import Any

from tests.reports.study_parts import (
    ARMS,
    CAPTIONS,
    NAN,
    SIZES,
    cell,
    comparisons,
    curve,
    failure,
    health,
    pending,
    picture,
    ratio,
    run,
    targets,
    trial,
    tuning,
)


def full(arms: tuple[str, ...] = ARMS, seeds: int = 3, vaes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every part is there; quality is 4 + 3.1 log(parameters) / log(e) and a gain of the arm, with noise."""
    draw = random.Random(0)
    runs, cells = [], []
    for vae in vaes or (None,):
        for arm in arms:
            for size, cost in SIZES.items():
                mine = [run(draw, arm, size, cost, seed, vae) for seed in range(seeds)]
                runs += mine
                cells.append(cell(arm, size, cost, vae, mine))
    tuned = [entry for arm in arms for entry in tuning(draw, arm, (1, 2, 3, 5) if vaes else (None,))]
    failed = "main/relu-m-seed1" if len(arms) <= 4 else "main/arm1-m-seed1"
    study = minimal() | {
        "status": "partial",
        "arms": [{"name": arm, "is_candidate": arm == arms[0], "overrides": [f"activation={arm}"],
                  "learning_rates": {size: 0.002 for size in SIZES}} for arm in arms],
        "sizes": [{"name": size, "cost": cost} for size, cost in SIZES.items()],
        "vaes": list(vaes),
        "confidence": 0.95,
        "candidate": arms[0],
        "answer": {
            "verdict": "supported",
            "headline": f"{arms[0]} reaches the quality of {arms[1]} with 1.8 times fewer parameters (1.2 to 2.9).",
            "sentences": [
                "Over four sizes and three seeds the lines are parallel; the interval of the ratio excludes 1.",
                "The claimed ratio of 2 lies inside the interval, 2.5 does too: neither is confirmed nor excluded.",
                "Against swiglu, the best baseline, the interval holds 1: undecided.",
            ],
            "rule": "Supported if the 95 % interval of the size ratio against every baseline lies above 1; refuted if "
            "one lies below; undecided otherwise.",
        },
        "cells": cells,
        "comparisons": comparisons(arms, vaes),
        "ratios": [ratio(arms[0], arm, i, vae) for vae in vaes or (None,) for i, arm in enumerate(arms[1:])],
        "rate_distortion": [
            {"arm": arms[0], "baseline": arm, "difference": 0.21, "low": -0.05, "high": 0.47, "n": seeds,
             "note": "over the rates that both arms reach, 2,100 to 2,400 nats"} for arm in arms[1:]],
        "tuning": tuned,
        "curves": [curve(arm, size, vae) for vae in vaes or (None,) for arm in arms for size in SIZES],
        "health": [health(draw, arm, size) for arm in arms for size in ("s", "l")],
        "pictures": [picture(key, caption, arms) for key, caption in CAPTIONS.items()],
        "targets": targets(),
        "failures": [failure(failed, 1, "failed", NAN), failure(failed, 2, "killed", "")],
        "runs": [*runs, *(trial(name) for entry in tuned for point in entry["points"] for name in point["runs"])],
        "warnings": ["relu, size m: seed 1 failed once and was started again"],
    }  # fmt: skip
    study["counts"] = {"planned": len(runs) + 1, "finished": len(runs), "failed": 1, "pending": 0, "attempts": 27}
    return study


def minimal() -> dict[str, Any]:
    """Frozen a moment ago: one size, no run finished."""
    return {
        "schema": "study_report/v1",
        "kind": "study",
        "study": "vae_size",
        "question": "Do Bezier activations give the same quality with 2 to 2.5 times fewer parameters?",
        "status": "partial",
        "counts": {"planned": 4, "finished": 0, "failed": 0, "pending": 4, "attempts": 0},
        "metric": {"name": "psnr", "label": "PSNR", "unit": "dB", "better": "higher", "split": "test"},
        "answer": {
            "verdict": "no data",
            "headline": "No run has finished yet.",
            "sentences": [],
            "rule": "Interval above 1.",
        },
        "confidence": 0.95,
        "candidate": "bezier",
        "axis": {"label": "parameters", "unit": ""},
        "arms": [
            {"name": arm, "is_candidate": arm == "bezier", "overrides": [f"activation={arm}"], "learning_rates": {}}
            for arm in ("bezier", "relu")
        ],
        "sizes": [{"name": "s", "cost": None}],
        "vaes": [],
        "cells": [],
        "comparisons": [],
        "ratios": [],
        "rate_distortion": [],
        "factorial": None,
        "tuning": [],
        "curves": [],
        "health": [],
        "pictures": [],
        "targets": None,
        "failures": [],
        "runs": [pending(arm, seed) for arm in ("bezier", "relu") for seed in range(2)],
        "provenance": {
            "plan_hash": "5f" * 32,
            "group": "vae_size-beef",
            "frozen": "2026-11-28T00:00:00Z",
            "git": {"commit": "0123abcd", "dirty": False},
            "versions": {"torch": "2.9.0", "python": "3.11.7"},
            "hosts": ["node1"],
            "ledger": "ledger.sqlite",
            "command": "python -m fluxflow_train.report study=outputs/vae_size",
        },
        "warnings": [],
    }


def flow() -> dict[str, Any]:
    """A flow study with two VAEs, crossed, measured by KID."""
    study = full(("bezier", "relu"), vaes=("bezier", "relu"))
    study["metric"] = {"name": "kid", "label": "KID", "unit": "", "better": "lower", "split": "train-ref"}
    names = {"vae": "VAE: bezier instead of relu", "flow": "flow: bezier instead of relu", "interaction": "interaction"}
    study["factorial"] = {
        **{"vae_arms": ["bezier", "relu"], "flow_arms": ["bezier", "relu"], "size": "s", "n": 3},
        "common": study["comparisons"][0] | {"size": "s", "vae": "relu"},
        "effects": [
            {
                "name": label[:4],
                "label": label,
                "difference": 0.3 - 0.2 * i,
                "low": 0.1 - 0.3 * i,
                "high": 0.5,
                "p": 0.02,
            }
            for i, (name, label) in enumerate(names.items())
        ],
        "cells": [[0.021, 0.023], [0.026, 0.029]],
    }
    return study
