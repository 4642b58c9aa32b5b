"""Studies for tests: a plan, networks as freezing would leave them, and records as runs would."""

import math
from typing import Any

from fluxflow_train import rng
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.ledger import Ledger
from fluxflow_train.ablation.plan import Plan, Run
from fluxflow_train.ablation.plan_file import parse

CONTENT: dict[str, Any] = {
    "name": "study",
    "question": "Which?",
    "experiment": "vae_bezier",
    "overrides": ["data=shapes"],
    "arms": {"bezier": ["activation=bezier"], "relu": ["activation=relu"]},
    "candidate": "bezier",
    "sizes": {"s": ["scale.vae.encoder_widths=[8,8,8]"], "m": ["scale.vae.encoder_widths=[16,16,16]"]},
    "match": "parameters",
    "tolerance": 0.01,
    "seeds": [0, 1],
    "budget_images": 64,
    "vaes": None,
    "tuning": None,
    "metric": {"name": "psnr", "label": "PSNR", "unit": "dB", "better": "higher", "split": "test"},
    "decision": {"size_ratio": 2.0, "against": ["relu"], "margin": 0.3, "confidence": 0.95},
    "targets": False,
}
TUNING: dict[str, Any] = {
    "key": "scale.learning_rate",
    "values": [0.004, 0.001],
    "guidance": None,
    "sizes": ["m"],
    "seeds": [100],
    "budget_images": 32,
}
VAES = {
    "experiment": "vae_bezier",
    "overrides": ["data=shapes"],
    "arms": {"bezier": ["activation=bezier"], "relu": ["activation=relu"], "common": ["activation=silu"]},
    "budget_images": 32,
}


def plan_of(**changes: Any) -> Plan:
    return parse({**CONTENT, **changes}, "study.yaml")


def frozen_of(plan: Plan, growth: float = 2.0) -> Frozen:
    """Sizes of 1e5, growth 1e5, ... parameters."""
    costs = {size: 1e5 * growth**k for k, size in enumerate(plan.sizes)}
    networks = {
        arm: {
            size: {
                "overrides": [f"model.encoder.widths=[{k + 8}]"],
                "cost": cost,
                "reference_cost": cost,
                "residual": 0.001,
                "match_ratio": 1.0,
                "parameters": int(cost),
                "flops": int(100 * cost),
                "activation_bytes": int(10 * cost),
                "batch_size": 4,
            }
            for k, (size, cost) in enumerate(costs.items())
        }
        for arm in plan.arms
    }
    vaes = {name: networks[plan.candidate][next(iter(plan.sizes))] for name in (plan.vaes.arms if plan.vaes else {})}
    origin = {"git": "abc", "environment": {"torch": "2"}, "axis": "parameters", "precision": "32-true", "id": "beef"}
    origin |= {"time": "2026-01-01T00:00:00Z"}
    return Frozen(plan, networks, vaes, origin)


def record_of(run: Run, metric: float, rate: float | None = 500.0) -> dict[str, Any]:
    """What the ledger keeps of a finished run."""
    return {
        **run.place,
        "learning_rate": run.value,
        "guidance": None,
        "directory": f"runs/{run.name}",
        "host": "here",
        "metric": metric,
        "swept": [],
        "results": {"psnr": metric},
        "report_status": "final",
        "images_seen": 64,
        "seconds": 2.0,
        "memory_mib": 100.0,
        "rate_nats": rate,
        "weights_sha256": "0" * 64,
        "config_sha256": "1" * 64,
        "compared_sha256": "2" * 64,
        "command": f"python -m fluxflow_train {run.name}",
        "git": "abc",
        "environment": {"torch": "2", "device": "a processor"},
        "curves": {"val/psnr": {"images": [32, 64], "values": [metric - 1, metric]}},
        "health": None,
        "pictures": [{"key": "k", "caption": "a circle", "input": "aW4=", "output": "b3V0"}],
    }


def written(ledger: Ledger, frozen: Frozen, metrics: dict[str, float]) -> None:
    """A ledger with the plan and the given results, by the runs' names."""
    origin = {key: value for key, value in frozen.origin.items() if key != "time"}
    ledger.add("frozen", None, None, {**frozen.record(), "origin": origin})
    for run in frozen.runs:
        if run.name in metrics:
            ledger.add("begun", run.name, 1, {})
            ledger.add("finished", run.name, 1, record_of(run, metrics[run.name]))


def simulated(frozen: Frozen, offsets: dict[str, float], slope: float, sd: float, seed: int = 0) -> dict[str, float]:
    """quality = offset of the arm + slope log cost + an effect of the seed + noise, for every run to compare."""
    found = {}
    for number, run in enumerate(frozen.runs):
        if run.phase != "main" or run.arm is None or run.size is None:
            continue
        shared = rng.generator(seed, "study-seed", run.seed).normal(0, 0.5)
        noise = rng.generator(seed, "study-noise", number).normal(0, sd)
        found[run.name] = offsets[run.arm] + slope * math.log(frozen.cost(run.size)) + shared + noise
    return found
