"""The project page's table of targets, measured: parameters, inference time, training memory, FID.

Each arm's largest run of the first seed; speed and memory in a process of their own, on the machine at hand.
"""

import json
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fluxflow_train.ablation.frozen import RUNS, Frozen
from fluxflow_train.ablation.ledger import Ledger
from fluxflow_train.ablation.plan import Run

SIDE, STEPS, BATCH = 512, 50, 2  # of the published table
GUIDANCE = 3.0  # the same for all: at 1 the network runs once a step, not twice
QUICK = 5.0  # seconds: what takes less is timed three times
NO_FID = "FID needs the Inception weights and COCO: evaluate protocol=coco2014-val-30k, then study again"

Row = dict[str, Any]


def missing(frozen: Frozen, folder: Path, ledger: Ledger) -> list[Run]:
    """One finished run for every arm that is to be measured: of the largest size and the first seed.

    An arm is measured again where its FID has been evaluated since.
    """
    plan, finished = frozen.plan, ledger.finished()
    if not plan.targets:
        return []
    measured = ledger.records("measured", tuple(plan.arms))
    largest = max(plan.sizes, key=frozen.cost)
    first: dict[str, Run] = {}
    for run in frozen.runs:
        is_candidate = run.phase == "main" and run.size == largest and run.name in finished
        if is_candidate and run.arm and (folder / RUNS / run.name / "model.json").exists():
            first.setdefault(run.arm, run)
    return [
        run
        for arm, run in first.items()
        if arm not in measured
        or (measured[arm]["rows"]["fid"]["value"] is None and fid_of(folder / RUNS / run.name)["value"] is not None)
    ]


def measure(run: Run, folder: Path, ledger: Ledger) -> None:
    """Measure one arm and write it into the ledger; what can't be measured has its reason there."""
    directory = folder / RUNS / run.name
    rows: dict[str, Row] = {"fid": fid_of(directory)}
    hardware = ""
    for step, names in ((inference, ("parameters", "seconds")), (training_memory, ("memory_gib",))):
        context = multiprocessing.get_context("spawn")  # a process each: peak memory is of a process
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found, hardware = pool.submit(step, directory).result()
                rows |= found
        except (BrokenProcessPool, RuntimeError, MemoryError) as error:  # killed, or out of memory
            reason = f"not to be had on this machine: {type(error).__name__} {error}".splitlines()[0]
            rows |= {name: {"value": None, "note": reason} for name in names}
    ledger.add("measured", run.arm, None, {"measured_run": run.name, "hardware": hardware, "rows": rows})


def fid_of(directory: Path) -> Row:
    """The FID of the run's last evaluation by a protocol that gives one."""
    for path in sorted((directory / "evaluations").glob("*/report.json"), key=lambda path: path.stat().st_mtime)[::-1]:
        report = json.loads(path.read_text())
        value = next((entry["raw"] for entry in report["results"] if entry["name"] == "fid"), None)
        if value is not None:
            return {"value": value, "note": f"FID by {report['protocol']['id']}, {report['status']}"}
    return {"value": None, "note": NO_FID}


def inference(directory: Path) -> tuple[dict[str, Row], str]:
    """Parameters of the exported model, and seconds of one picture of 512 px in 50 steps with guidance."""
    from fluxflow_train.pipeline import Pipeline
    from fluxflow_train.weights import load_model

    model, description = load_model(directory)
    frozen = [name for name, child in model.named_children() if not any(p.requires_grad for p in child.parameters())]
    parameters = {
        "value": float(sum(p.numel() for p in model.parameters())),
        "note": f"all of the exported model, {', '.join(frozen)} included" if frozen else "all of the exported model",
    }
    if "vae" not in description["architecture"]:
        return {
            "parameters": parameters,
            "seconds": {"value": None, "note": "a VAE alone draws no pictures"},
        }, device()[1]
    pipeline = Pipeline.from_run(directory)

    def draw(steps: int) -> float:
        started = time.perf_counter()
        pipeline("a picture", height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=GUIDANCE)
        return time.perf_counter() - started

    draw(2)  # warms up
    seconds = [draw(STEPS)]
    seconds += [draw(STEPS) for _ in range(2 if seconds[0] < QUICK else 0)]
    note = f"one picture, guidance {GUIDANCE:g}, text included, median of {len(seconds)} after a warm-up"
    return {"parameters": parameters, "seconds": {"value": statistics.median(seconds), "note": note}}, device()[1]


def training_memory(directory: Path) -> tuple[dict[str, Row], str]:
    """Peak GiB over that of the process before, of two training steps at 512 px on zeros; AdamW, fp32, no average."""
    import torch

    from fluxflow_train.ablation.cost import FlowInputs, VAEInputs
    from fluxflow_train.weights import load_model

    place, hardware = device()
    model, description = load_model(directory)
    model = model.to(place).train()
    inputs = FlowInputs(SIDE, SIDE, num_tokens=16) if "vae" in description["architecture"] else VAEInputs(SIDE, SIDE)
    arguments = [x.expand(BATCH, *x.shape[1:]).contiguous().to(place) for x in inputs(model)]
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resident_gib(reset=True) if place.type == "cpu" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for _ in range(2):
        output = model(*arguments)
        (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if place.type == "cuda":
        value, what = torch.cuda.max_memory_allocated(place) / 2**30, "the allocator's peak"
    elif before is not None and (after := resident_gib()) is not None:
        value, what = after - before + held / 2**30, "the peak of resident memory above that of the process"
    else:
        return {"memory_gib": {"value": None, "note": "only Linux tells a process's peak since a moment"}}, hardware
    note = f"training step without losses and average, fp32, AdamW, {SIDE} px, {place.type}: {what}"
    return {"memory_gib": {"value": value, "note": note}}, hardware


def device() -> tuple[Any, str]:
    """What is measured on, and its name."""
    import torch

    from fluxflow_train.reports.protocol import environment

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return place, environment(place)["device"]


def resident_gib(reset: bool = False) -> float | None:
    """The highest resident memory since the last reset, or since now; None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20  # type: ignore[index]
