"""The parts of an invented study, each as the analysis of a ledger makes it."""

import base64
import io
import math
import random
from typing import Any

from PIL import Image

ARMS = ("bezier", "relu", "silu", "swiglu")
SIZES = {"xs": 9.1e4, "s": 1.8e5, "m": 3.6e5, "l": 7.4e5}
CAPTIONS = {"1F600": "grinning face", "1F98A": "fox", "1F30D": "globe showing Europe-Africa", "26F5": ""}
NAN = "RuntimeError: loss is nan at images_seen=12800\n  in fluxflow_train/tasks/vae.py\nlast lr 0.008"
GAINS = {"bezier": 1.1, "relu": -0.6, "silu": 0.0, "swiglu": 0.5}


def pending(arm: str, seed: int) -> dict[str, Any]:
    name = f"main/{arm}-s-seed{seed}"
    nothing = (
        "value",
        "metric",
        "report_status",
        "learning_rate",
        "guidance",
        "parameters",
        "seconds",
        "memory_mib",
        "images_seen",
    )
    return {
        **dict.fromkeys((*nothing, "weights_sha256", "config_sha256", "host", "vae")),
        **{"name": name, "phase": "main", "arm": arm, "size": "s", "seed": seed, "status": "pending", "attempts": 0},
        "command": f"python -m fluxflow_train activation={arm} seed={seed}",
        "directory": f"runs/{name}",
    }


def run(draw: random.Random, arm: str, size: str, cost: float, seed: int, vae: str | None) -> dict[str, Any]:
    quality = 4 + 3.1 * math.log(cost) / 2.2 + GAINS.get(arm, draw.gauss(0, 0.6)) + draw.gauss(0, 0.15)
    name = f"main/{arm}-{size}-seed{seed}" + (f"-{vae}" if vae else "")
    return pending(arm, seed) | {
        **{"name": name, "size": size, "vae": vae, "status": "finished", "attempts": 1, "metric": quality},
        **{
            "report_status": "final",
            "learning_rate": 0.002,
            "parameters": int(cost),
            "seconds": cost / 9e3 * draw.uniform(1, 1.3),
        },
        **{"memory_mib": 640 + cost / 900, "images_seen": 20000, "host": "node1", "directory": f"runs/{name}"},
        **{"weights_sha256": f"{draw.getrandbits(256):064x}", "config_sha256": f"{draw.getrandbits(256):064x}"},
    }


def trial(name: str) -> dict[str, Any]:
    return pending("relu", 0) | {"name": name, "phase": "tune", "status": "finished", "attempts": 1, "metric": 20.0}


def failure(run: str, attempt: int, event: str, error: str) -> dict[str, Any]:
    time = f"2026-11-28T0{attempt}:02:03Z"
    return {"run": run, "attempt": attempt, "event": event, "time": time, "error": error, "retried": True}


def cell(arm: str, size: str, cost: float, vae: str | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    values = [r["metric"] for r in runs]
    mean = sum(values) / len(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    half = {1: None, 2: 12.7, 3: 4.3}.get(len(values), 2.5)
    bounds = (
        (None, None) if half is None else (mean - half * sd / len(values) ** 0.5, mean + half * sd / len(values) ** 0.5)
    )
    more = {"bezier": 1.4, "swiglu": 1.2}.get(arm, 1.0)
    return {
        **{
            "arm": arm,
            "size": size,
            "vae": vae,
            "n": len(values),
            "mean": mean,
            "low": bounds[0],
            "high": bounds[1],
            "sd": sd,
        },
        **{
            "parameters": int(cost * 1.003),
            "flops": cost * 310 * more,
            "activation_bytes": cost * 30,
            "residual": 0.003,
        },
        **{"learning_rate": 0.002, "guidance": None, "seconds": sum(r["seconds"] for r in runs) / len(runs) * more},
        **{
            "images_per_second": 140.0 / more,
            "memory_mib": 900.0,
            "rate_nats": 2300.0,
            "runs": [r["name"] for r in runs],
        },
    }


def comparisons(arms: tuple[str, ...], vaes: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            **{"arm": arms[0], "baseline": arm, "size": size, "vae": vae, "n": 3, "margin": 0.3, "rates_agree": i != 1},
            **{"difference": 1.5 - 0.7 * i + 0.1 * j, "low": 0.9 - 0.7 * i - 0.2 * j, "high": 2.1 - 0.7 * i + 0.3 * j},
            **{"p": 0.01 * (1 + i), "p_holm": 0.03 * (1 + i), "correlation": 0.62, "detectable": 0.35},
            **{"equivalent": False, "p_equivalent": 0.8},
        }
        for vae in vaes or (None,)
        for j, size in enumerate((None, *SIZES))
        for i, arm in enumerate(arms[1:])
    ]


def ratio(arm: str, baseline: str, i: int, vae: str | None) -> dict[str, Any]:
    x = [9.1e4, 7.4e5]
    lines = [{"arm": a, "x": x, "y": [4 + 1.41 * math.log(p) + GAINS.get(a, 0) for p in x]} for a in (arm, baseline)]
    return {
        **{
            "arm": arm,
            "baseline": baseline,
            "vae": vae,
            "n": 3,
            "ratio": 2.1 / (1 + 0.3 * i),
            "low": 1.4 / (1 + 0.3 * i),
        },
        **{"high": None if i == 2 else 2.9, "bounded": i != 2, "slope": 1.41, "slope_low": 1.2, "slope_high": 1.6},
        "note": "the slopes may be 0 in one resampling of forty" if i == 2 else "",
        **{"lines": lines, "curvature": {"estimate": 0.1, "low": -0.2, "high": 0.4} if i == 0 else None},
    }


def tuning(draw: random.Random, arm: str, scales: tuple[float | None, ...]) -> list[dict[str, Any]]:
    best, scale = draw.choice((0.001, 0.002, 0.004)), draw.choice(scales)
    points = [
        {
            "value": v,
            "guidance": g,
            "mean": 20 - 2 * math.log(v / best) ** 2 - abs((g or 0) - (scale or 0)) + GAINS.get(arm, 0),
            "values": [20.0],
            "runs": [f"tune/{arm}-s-{v}"],
        }
        for v in (0.0005, 0.001, 0.002, 0.004, 0.008)
        for g in scales
    ]
    return [
        {
            "arm": arm,
            "size": "s",
            "key": "scale.learning_rate",
            "points": points,
            "chosen": {"value": best, "guidance": scale},
            "edges": [scale] if scale == 5 else [],
        }
    ]


def curve(arm: str, size: str, vae: str | None) -> dict[str, Any]:
    cost = SIZES[size]
    images = [2000.0 * k for k in range(1, 11)]
    mean = [4 + 1.41 * math.log(cost) + GAINS.get(arm, 0) - 6 * math.exp(-x / 4000) for x in images]
    more = {"bezier": 1.4, "swiglu": 1.2}.get(arm, 1.0)
    return {
        **{"arm": arm, "size": size, "vae": vae, "name": "val/psnr", "images": images, "mean": mean},
        **{"low": [v - 0.2 for v in mean], "high": [v + 0.25 for v in mean]},
        **{"flops_per_image": cost * 930 * more, "seconds_per_image": cost / 5e7 * more},
    }


def health(draw: random.Random, arm: str, size: str) -> dict[str, Any]:
    layers = [
        {"name": f"encoder.stages.{d}", "kind": arm, "depth": d, "dead": 0.02 * d * (arm == "relu"), "outside": 0.0,
         "saturated": 0.01 * d if arm == "bezier" else None, "variance": math.exp(draw.gauss(0, 0.5)) * 0.8**d,
         "grad_norm": 10 ** draw.gauss(-2, 0.3)} for d in range(8)]  # fmt: skip
    t = [k / 20 for k in range(21)]
    learned = {"name": "encoder.stages.0", "num_channels": 12, "channels": [0, 5, 11], "t": t,
               "values": [[v * a - a * v**3 for v in t] for a in (0.6, 1.0, 1.4)],
               "points": [[0, 0.3 * a, 0.5 * a, 0] for a in (0.6, 1.0, 1.4)]}  # fmt: skip
    hits = [[round(400 * math.exp(-60 * (a - 0.5) ** 2 - 30 * (b - a + a**3) ** 2)) for b in t[:-1]] for a in t[:-1]]
    density = {"name": "encoder.stages.0", "t_edges": t, "y_edges": t, "counts": hits}
    own = arm == "bezier"
    return {
        **{"arm": arm, "size": size, "vae": None, "run": f"main/{arm}-{size}-seed0", "dead": 0.07, "saturated": 0.02},
        **{"outside": 0.0 if own else None, "layers": layers},
        **{"curves": [learned] if own else [], "densities": [density] if own else []},
    }


def picture(key: str, caption: str, arms: tuple[str, ...]) -> dict[str, Any]:
    shown: dict[str, str | None] = {arm: png(key, i + 1) for i, arm in enumerate(arms)}
    shown[arms[-1]] = None if key == "26F5" else shown[arms[-1]]
    return {"key": key, "caption": caption, "size": "l", "vae": None, "input": png(key, 0), "arms": shown}


def png(key: str, blur: int) -> str:
    draw = random.Random(key)
    image = Image.new("RGB", (32, 32), "white")
    for _ in range(6):
        x, y, side = draw.randrange(24), draw.randrange(24), draw.randrange(4, 14)
        image.paste(tuple(draw.randrange(256) for _ in range(3)), (x, y, x + side, y + side))
    image = image.resize((32 // (1 + blur // 2),) * 2).resize((32, 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def row(
    name: str, label: str, unit: str, published: list[str], values: list[float | None], note: str
) -> dict[str, Any]:
    measured = dict(zip(("relu", "bezier"), values, strict=True))
    entry = {"name": name, "label": label, "unit": unit, "published": published, "note": note, "values": measured}
    return entry | {"runs": {"relu": "main/relu-l-seed0"}}


def targets() -> dict[str, Any]:
    rows = [
        row("parameters", "Parameters", "", ["500M", "183M"], [1.4e6, 1.39e6], "of this study's largest size"),
        row(
            "seconds",
            "Inference, 512 px, 50 steps",
            "s",
            ["1.82 s", "1.12 s"],
            [41.2, 55.1],
            "on 2 CPU cores, not an A100",
        ),
        row(
            "memory",
            "Training memory, batch 2",
            "GB",
            ["10.2 GB", "4.1 GB"],
            [1.9, None],
            "bezier was not run at 512 px",
        ),
        row(
            "fid", "FID", "", ["15.2", "≤15.0"], [None, None], "the canonical Inception weights are not on this machine"
        ),
    ]
    return {"arms": ["relu", "bezier"], "hardware": "Intel Xeon, 2 cores, no GPU", "rows": rows}
