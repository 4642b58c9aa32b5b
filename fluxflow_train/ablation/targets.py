"""The project page's table of targets, measured: parameters, inference time, training memory, FID.

Each arm's largest run of the first seed; speed and memory in a process of their own, on the machine at hand.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fluxflow_train.ablation.frozen import RUNS, Frozen
from fluxflow_train.ablation.ledger import Ledger
from fluxflow_train.ablation.plan import Run

SIDE, STEPS, BATCH = 512, 50, 2  # of the published table
FID = ("fid", "fid_5k")

Row = dict[str, Any]


def missing(frozen: Frozen, ledger: Ledger) -> list[Run]:
    """One finished run for every arm that has not been measured: of the largest size and the first seed."""
    plan, finished = frozen.plan, ledger.finished()
    if not plan.targets:
        return []
    largest = max(plan.sizes, key=frozen.cost)
    first: dict[str, Run] = {}
    for run in frozen.runs:
        is_candidate = run.phase == "main" and run.size == largest and run.name in finished
        if is_candidate and run.arm and f"target/{run.arm}" not in finished:
            first.setdefault(run.arm, run)
    return list(first.values())


def measure(run: Run, folder: Path, ledger: Ledger) -> None:
    """Measure one arm and write it into the ledger."""
    record = ledger.records("finished", (run.name,))[run.name]
    fid = next((record["results"][name] for name in FID if record["results"].get(name) is not None), None)
    no_fid = "FID needs the Inception weights and COCO: evaluate protocol=coco2014-val-30k"
    directory = folder / RUNS / run.name
    rows: dict[str, Row] = {"fid": {"value": fid, "note": "" if fid is not None else no_fid}}
    for step in (inference, training_memory):  # a process each: peak memory is of a process
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows |= pool.submit(step, directory).result()
    hardware = record["environment"]["device"]
    target = {"phase": "target", "arm": run.arm, "measured_run": run.name, "hardware": hardware, "rows": rows}
    ledger.add("finished", f"target/{run.arm}", 1, target)


def inference(directory: Path) -> dict[str, Row]:
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
            "seconds": {"value": None, "note": "a VAE alone draws no pictures from noise"},
        }
    pipeline = Pipeline.from_run(directory)
    started = time.perf_counter()
    pipeline("a picture", height=SIDE, width=SIDE, num_inference_steps=STEPS)
    note = f"one picture, {pipeline.device}, with guidance, text included"
    return {"parameters": parameters, "seconds": {"value": time.perf_counter() - started, "note": note}}


def training_memory(directory: Path) -> dict[str, Row]:
    """Peak GiB over that of the bare process, of two training steps at 512 px on random inputs; AdamW, fp32."""
    import torch

    from fluxflow_train.ablation.cost import FlowInputs, VAEInputs
    from fluxflow_train.reports.protocol import peak_memory_mib
    from fluxflow_train.weights import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = peak_memory_mib(device)
    model, description = load_model(directory)
    model = model.to(device).train()
    inputs = FlowInputs(SIDE, SIDE, num_tokens=16) if "vae" in description["architecture"] else VAEInputs(SIDE, SIDE)
    arguments = [x.expand(BATCH, *x.shape[1:]).contiguous().to(device) for x in inputs(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    for _ in range(2):
        output = model(*arguments)
        (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = peak_memory_mib(device)
    if before is None or after is None:
        return {"memory_gib": {"value": None, "note": "this system does not tell"}}
    what = "allocator's peak" if device.type == "cuda" else "resident memory above the bare process"
    return {"memory_gib": {"value": (after - before) / 1024, "note": f"fp32, AdamW, {SIDE} px, {device.type}: {what}"}}
