"""The body of `study`: a plan frozen, its missing runs made, its report written."""

import itertools
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fluxflow_train.ablation import frozen as freezer
from fluxflow_train.ablation.analysis import analyse
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.ablation.plan import Plan, Run, expand
from fluxflow_train.ablation.plan_file import load
from fluxflow_train.ablation.targets import measure, missing
from fluxflow_train.ablation.worker import Worker, progress, work_together
from fluxflow_train.cli import quoted
from fluxflow_train.data.lock import held
from fluxflow_train.errors import Stopped, UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.freezing import freeze
from fluxflow_train.reports.page import number
from fluxflow_train.reports.study_page import write_study_report

console = Console(stderr=True)

FREE = (
    "data.num_workers",
    "data.root",
    "latents_device",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
)
AROUND = 25.0  # seconds of a run that are not training: imports, validation, report
STEP = 1.3  # a whole step beside its forward and backward
DRAWN = 8000  # images of training that cost as much as the pictures of a flow's report: 400, 30 steps, with guidance
BYTES = 20  # of a parameter in training: itself, its gradient, AdamW's two moments, the average


def study(cfg: DictConfig) -> None:
    """Freeze the plan, or go on with it; make what is missing; report.

    Raises:
        UserError: the plan is not well formed, can't be matched, or another one was frozen in the folder.
        Stopped: a signal came; the same command goes on.
    """
    plan = load(str(cfg.plan))
    folder = Path(cfg.dir or f"outputs/study/{plan.name}").expanduser()
    if cfg.workers < 1 or cfg.attempts < 1:
        raise UserError("workers and attempts are 1 or more")
    if cfg.dry_run:
        if (already := freezer.read(Ledger(folder / FILE_NAME))) is not None:
            freezer.refuse_another(already, plan, folder)
        frozen = freeze(plan, cfg.runs.trainer, timed=True)
        show(frozen)
        console.print(f"{len(frozen.runs)} runs: {counted(plan)}; about {duration(frozen)} one by one", highlight=False)
        return
    frozen = frozen_in(folder, plan, cfg.runs.trainer)
    ledger = Ledger(folder / FILE_NAME)
    extra = surroundings(cfg)

    def say(line: str) -> None:
        counts = progress(frozen, ledger, cfg.attempts)
        done = counts["finished"] + counts["failed"]
        console.print(f"[{done}/{len(frozen.runs)}] {line}", markup=False, highlight=False, soft_wrap=True)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cfg.threads or (max(1, cores // cfg.workers) if cfg.workers > 1 else None)
    gpus = visible_gpus() if cfg.workers > 1 else []
    workers = [
        Worker(frozen, folder, extra, names(frozen, extra), threads, gpu, cfg.attempts, say)
        for gpu, _ in zip(itertools.cycle(gpus or [None]), range(cfg.workers), strict=False)
    ]
    try:
        work_together(workers)
    except Stopped as stop:
        raise Stopped(f"{stop} (study in {folder})") from stop
    finally:
        with held(folder / ".lock", "reporting"):
            report(folder)
    counts = progress(frozen, ledger, cfg.attempts)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count), highlight=False)
    if counts["failed"]:
        console.print(f"attempts={cfg.attempts + 1} tries failed runs again", highlight=False)
    if workers[0].is_over():
        measure_targets(frozen, folder)


def measure_targets(frozen: Frozen, folder: Path) -> None:
    """Fill the table of targets once all runs are over, so that nothing else is timed along."""
    ledger = Ledger(folder / FILE_NAME)
    with held(folder / ".lock", "measuring"):
        waiting = missing(frozen, folder, ledger)
        for run in waiting:
            console.print(f"measuring {run.name} for the table of targets", highlight=False)
            measure(run, folder, ledger)
        if waiting:
            report(folder)


def visible_gpus() -> list[str]:
    """GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; its runs, one for each worker, get one each."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(i) for i in range(count)] if given is None else given.split(",")[:count]


def frozen_in(folder: Path, plan: Plan, trainer: str | None) -> Frozen:
    """What is frozen in the folder; by this command, where none was."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / FILE_NAME)
    with held(folder / ".lock", "freezing the plan"):
        frozen = freezer.read(ledger)
        if frozen is None:
            frozen = freeze(plan, trainer)
            ledger.add("frozen", None, None, frozen.record())
            show(frozen)
    freezer.refuse_another(frozen, plan, folder)
    console.print(f"plan {plan.name} {plan.hash[:12]}, {len(frozen.runs)} runs, in {folder}", highlight=False)
    return frozen


def report(folder: Path, publish: str | None = None) -> None:
    """Write `report.json`, `report.html` and `report.md` of the study in the folder, from its ledger alone.

    Where wandb-workspaces is installed, also `dashboard.json`: the specification of W&B's workspace and report, which
    `publish` (an entity, or entity/project) saves there.

    Raises:
        UserError: there is no ledger in the folder.
    """
    found = analyse(Ledger(folder / FILE_NAME), f"python -m fluxflow_train.report study={folder}")
    write_study_report(found, folder)
    if find_spec("wandb_workspaces") is not None:
        write_dashboard(found, folder, publish)
    elif publish is not None:
        raise UserError('publish= needs wandb-workspaces: pip install "fluxflow-train[wandb]"')
    answer = found["answer"]
    for line in (answer["headline"], *answer["sentences"][:8]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def write_dashboard(found: dict[str, Any], folder: Path, publish: str | None) -> None:
    from fluxflow_train.reports import dashboard

    text = json.dumps(dashboard.specification(found), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "dashboard.json", text.encode())
    if publish is not None:
        entity, _, project = publish.partition("/")
        for name, address in dashboard.publish(found, entity, project or dashboard.PROJECT).items():
            console.print(f"{name}: {address}", highlight=False, soft_wrap=True)


def surroundings(cfg: DictConfig) -> list[str]:
    """Overrides of where and how the runs are made.

    Raises:
        UserError: one of them would make other runs than the plan's.
    """
    given = {"trainer": cfg.runs.trainer, "logger": cfg.runs.logger, "data.root": cfg.data.root}
    extra = [f"{key}={quoted(str(value))}" for key, value in given.items() if value is not None]
    for override in cfg.runs.overrides:
        key = str(override).partition("=")[0].lstrip("+~")
        if key not in FREE and not key.startswith("logger."):
            raise UserError(
                f"runs.overrides={override} could change what is compared: put it into the plan; free are "
                f"{', '.join(FREE)} and logger.*"
            )
        extra.append(str(override))
    return extra


def names(frozen: Frozen, extra: list[str]) -> Callable[[Run], list[str]]:
    """W&B's names of each run, where the runs are recorded there."""
    if "logger='wandb'" not in extra:
        return lambda run: []
    from fluxflow_train.ablation.wandb_names import wandb_overrides

    def of(run: Run) -> list[str]:
        network = frozen.networks[run.arm][run.size] if run.arm and run.size else frozen.vaes[run.vae or ""]
        costs = {key: network[key] for key in ("parameters", "flops")}
        return wandb_overrides(frozen.plan.name, frozen.group, run, **costs)

    return of


# ---- what a dry run prints ----


def show(frozen: Frozen) -> None:
    """Every network of the plan: what it has, what it costs, how far it is from what it is matched to."""
    shown = Table(title=f"{frozen.plan.name}: matched by {frozen.plan.match}", title_justify="left", box=None)
    for heading in ("arm", "size", "runs", "parameters", "FLOPs", "residual", "memory"):
        shown.add_column(heading, justify="left" if heading in ("arm", "size") else "right", no_wrap=True)
    rows = [("VAE", name, network) for name, network in frozen.vaes.items()]
    rows += [(arm, size, net) for arm, sizes in frozen.networks.items() for size, net in sizes.items()]
    for arm, size, net in rows:
        count = sum((r.arm or "VAE", r.size or r.vae) == (arm, size) for r in frozen.runs)
        memory = net["activation_bytes"] * net["batch_size"] + BYTES * net["parameters"]
        cells = (
            f"{net['parameters']:,}",
            number(net["flops"]),
            f"{net['residual']:+.2%}",
            f"{memory / 2**20:,.0f} MiB",
        )
        shown.add_row(arm, size, str(count), *cells)
    console.print(shown)
    console.print("FLOPs: forward, per image; memory: of training, in fp32, calculated", highlight=False)
    for arm, size, net in rows:
        widths = ", ".join(override.removeprefix("model.") for override in net["overrides"])
        console.print(f"{arm} {size}: {widths}", markup=False, highlight=False, soft_wrap=True)


def counted(plan: Plan) -> str:
    kinds = {"vae": "VAEs", "tune": "trials", "main": "to compare"}
    phases = [run.phase for run in expand(plan)]
    return ", ".join(f"{phases.count(phase)} {kinds[phase]}" for phase in kinds if phase in phases)


def duration(frozen: Frozen) -> str:
    """Of all runs one by one on this machine, from steps that were timed when the plan was solved."""
    plan, total = frozen.plan, 0.0
    for run in frozen.runs:
        if run.phase == "vae" and plan.vaes is not None and run.vae is not None:
            images, network = plan.vaes.budget_images, frozen.vaes[run.vae]
        else:
            assert run.arm is not None and run.size is not None
            images, network = plan.budget_images, frozen.networks[run.arm][run.size]
            scales = 0
            if run.phase == "tune" and plan.tuning is not None:
                images, scales = plan.tuning.budget_images, len(plan.tuning.guidance or ())
            if plan.vaes is not None:
                images += DRAWN * (1 + scales)
        total += AROUND + STEP * images * network["seconds_per_image"]
    hours, minutes = divmod(round(total / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
