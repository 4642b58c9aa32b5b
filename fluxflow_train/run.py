"""The bodies of the commands: train a run and export it, evaluate it, prepare its data."""

import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fluxflow_train import preemption, provenance, ranks, rng
from fluxflow_train.callbacks.checkpoint import LAST
from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.composing import bind_vae, open_run, plain, refuse_impossible, refuse_unknown_split
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.loader import worker_deaths
from fluxflow_train.errors import Stopped, UserError
from fluxflow_train.evaluating import evaluate_by_protocol, prepare_reference, provenance_of
from fluxflow_train.hardware import device_of
from fluxflow_train.records import CSVRecords
from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.wandb_log import log_report
from fluxflow_train.run_directory import RunDirectory
from fluxflow_train.strategy import NetwiseFSDP
from fluxflow_train.weights import load_model, load_weights, save_model

console = Console(stderr=True)

LAUNCHED_RUN = "FLUXFLOW_LAUNCHED_RUN"  # tells the processes that Lightning starts which run they belong to

SAMPLING = ("objective", "sampler", "cfg_dropout_prob")  # what a report on generated pictures must know


def train(cfg: DictConfig) -> None:
    """Train, export, evaluate; or go on where the run directory stopped. On any number of ranks."""
    quieten()
    with ranks.process_group(ranks.backend()) as here, ranks.others(), worker_deaths():
        directory, config = opened(cfg, here)
        task, images, trainer = fit(directory, config, here)
        ranks.part()  # what follows the first rank does alone
    if trainer.is_global_zero:
        export(directory, config, task, images, trainer)
        if config.evaluate.split is not None:
            report(directory, config, images, config.evaluate.split, task.device)


def fit(directory: RunDirectory, config: DictConfig, here: ranks.Ranks) -> tuple[Any, ImageData, L.Trainer]:
    """Train to the end of the budget.

    Raises:
        Stopped: a signal came, or the time was over; all is saved.
    """
    torch.manual_seed(rng.torch_seed(config.seed, "weights", config.weights_stream))
    task: Any = instantiate(config.task)
    images: ImageData = instantiate(config.data.module)
    data = task.data_module(images)
    loggers = list(instantiate(config.logger).values())
    callbacks = list(instantiate(config.callbacks).values())
    trainer = build_trainer(config, data, loggers, callbacks, here)
    refuse_impossible(config, task, trainer.world_size)
    say = console.print if trainer.is_global_zero else lambda *_, **__: None
    say(headline(config, task, trainer, directory), highlight=False, soft_wrap=True)
    preemption.check()
    if here.local == 0:
        data.prepare_data()  # Lightning would have the other ranks wait where they can't hear a signal
    here.wait()

    checkpoint = here.first(lambda: str(path) if (path := directory.checkpoint()) else None)
    images_seen = -1
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["task"]
        images_seen = state["images_seen"]
        say(f"resuming at {images_seen:,} images from {checkpoint}", highlight=False, soft_wrap=True)
        if was := divided_differently(state, trainer.world_size, task.num_micro_batches):
            say(was, highlight=False, soft_wrap=True)
    for logger in loggers:
        if isinstance(logger, CSVRecords):
            logger.drop_after(images_seen)
    os.environ[LAUNCHED_RUN] = str(directory.path)
    threads = torch.get_num_threads()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        if launched_by_lightning():  # whose first process ends them all, by SIGKILL, when one ends with an error
            raise SystemExit(0) from stop
        how = str(stop) if str(stop).endswith("saved") else f"stopped by {preemption.noted()}, last checkpoint kept"
        go_on = f"{how}: go on with python -m fluxflow_train run={directory.path}"
        raise Stopped(go_on if trainer.is_global_zero else "") from stop
    except SystemExit as stop:  # what Lightning makes of a second Ctrl-C
        say(f"stopped at once: go on from the last checkpoint with python -m fluxflow_train run={directory.path}")
        raise KeyboardInterrupt from stop
    torch.set_num_threads(threads)  # several ranks on a machine shared its cores
    return task, images, trainer


def evaluate(cfg: DictConfig) -> None:
    """Measure a finished run again; by a protocol where one is named."""
    quieten()
    refuse_unknown_split(cfg.split)
    directory = RunDirectory(Path(cfg.run).expanduser())
    config = plain(directory.config())
    if cfg.protocol is not None:
        evaluate_by_protocol(cfg, directory.path, config)
        return
    images: ImageData = instantiate(config.data.module)
    images.prepare_data()
    report(directory, config, images, cfg.split, device_of(cfg.device))


def prepare(cfg: DictConfig) -> None:
    """Write the shards and the index of `data=...`; with `vae=...` also the latents and the text's hidden states.

    Several processes, by torchrun, srun or by hand, share the work through locks in the folders that are written.
    """
    if cfg.reference is not None:
        quieten()
        prepare_reference(cfg)
        return
    data: Any = instantiate(cfg.data.module)
    if cfg.vae is not None:
        bind_vae(cfg)
        vae, text = instantiate(cfg.model.vae), instantiate(cfg.model.text)
        load_weights(vae, cfg.vae, cfg.vae_sha256)
        data = instantiate(cfg.latents)(images=data, vae=vae, vae_sha256=cfg.vae_sha256, backbone=text.backbone)
    here = ranks.placed(dict(os.environ))
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local % torch.cuda.device_count())
    data.prepare_data()
    if not here.is_first:
        return
    for split in ("train", "tune", "test"):
        shards = data.source.shards(split)
        console.print(
            f"{split}: {data.num_samples(split):,} images in {len(shards)} shards, {Path(shards[0]).parent}",
            highlight=False,
            soft_wrap=True,
        )
    if cfg.vae is not None and (text := data.text()) is not None:
        lengths = ", ".join(f"{name} {value:g}" for name, value in text.token_lengths().items())
        console.print(f"tokens of the captions: {lengths}", highlight=False, soft_wrap=True)


# ---- training ----


def opened(cfg: DictConfig, here: ranks.Ranks) -> tuple[RunDirectory, DictConfig]:
    """The run, made or found by the first rank for all."""
    if launched_by_lightning():
        cfg.run = os.environ[LAUNCHED_RUN]
        return open_run(cfg, lock=False)
    mine: list[tuple[RunDirectory, DictConfig]] = []

    def make() -> dict[str, Any]:
        mine.append(open_run(cfg))
        return {"path": str(mine[0][0].path), "config": OmegaConf.to_container(mine[0][1])}

    answer = here.first(make)
    if mine:
        return mine[0]
    config = OmegaConf.create(answer["config"])
    assert isinstance(config, DictConfig)
    return RunDirectory(Path(answer["path"])), config


def launched_by_lightning() -> bool:
    """Whether another process of this command began the run and started this one beside it."""
    return LAUNCHED_RUN in os.environ and "RANK" not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def build_trainer(
    config: DictConfig, data: Any, loggers: list[Any], callbacks: list[L.Callback], here: ranks.Ranks
) -> L.Trainer:
    """Raises UserError where several processes were started for a trainer of one."""
    between = math.ceil(config.scale.validate_every / data.batch_size)
    started: dict[str, Any] = {"plugins": [LightningEnvironment()]}
    if here.world > 1:
        if "strategy" not in config.trainer:
            raise UserError(f"{here.world} processes were started, and this trainer uses one: add trainer=ddp")
        started = {
            "plugins": [TorchElasticEnvironment()],
            "devices": here.local_world,
            "num_nodes": here.machines,
        }
    trainer = instantiate(
        config.trainer,
        logger=loggers,
        callbacks=callbacks,
        val_check_interval=min(between, data.num_batches),
        **started,
    )
    # Signals are ours: Lightning's handler for SIGTERM starts a collective from inside the handler, and its notice of
    # it makes the host wait for the device before every batch.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def divided_differently(state: dict[str, Any], world_size: int, num_micro_batches: int) -> str:
    """What a resumed run on other ranks, or in other parts, can't keep; "" where it keeps everything."""
    before = len(state["meters"]), state["num_micro_batches"]
    now = world_size, num_micro_batches
    if now == before:
        return ""
    return (
        f"the run had {before[0]} ranks x {before[1]} micro batches and now has {now[0]} x {now[1]}: samples, noise "
        "and their order stay the same; sums are rounded in another order, so the last bits of the weights will not"
    )


def headline(config: DictConfig, task: Any, trainer: L.Trainer, directory: RunDirectory) -> str:
    """What is about to run, in one line."""
    sizes = " + ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
        for name, part in task.exported.named_children()
    )
    device = str(trainer.strategy.root_device)
    if trainer.world_size > 1:
        device = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    return (
        f"{config.name}: {sizes} parameters, {config.budget.images:,} images at {config.data.module.resolution} px, "
        f"{device} {config.trainer.precision}, in {directory.path}"
    )


def quieten() -> None:
    """Lightning's hints are for people who write training loops; ours are what the user reads."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*No CUDA runtime is found.*")


# ---- after training ----


@torch.no_grad()
def export(directory: RunDirectory, config: DictConfig, task: Any, images: ImageData, trainer: L.Trainer) -> None:
    """Write `model.safetensors`, of the averaged weights, and `model.json`."""
    average = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
    if isinstance(trainer.strategy, NetwiseFSDP):
        task = put_together(directory, config, average)
    with average.averaged(task):
        task.before_export(images)
        origin = {
            "experiment": config.name,
            "run_id": config.run_id,
            "images_seen": task.images_seen,
            "weights": "ema",
            "activation": OmegaConf.to_container(config.activation, resolve=True),
            "precision": config.trainer.precision,
            "seed": config.seed,
            "seconds_training": round(task.seconds_training, 1),
            "command": directory.command(),
            "git": provenance.git_state(),
        }
        description = task.description()
        description["provenance"] = origin | description.get("provenance", {})
        save_model(directory.path, task.exported, config.model, description)


def put_together(directory: RunDirectory, config: DictConfig, average: EMA) -> Any:
    """The task whole again after training in parts, from its last checkpoint; `average` too."""
    checkpoint = torch.load(directory.path / "checkpoints" / LAST, map_location="cpu", weights_only=True)
    task: Any = instantiate(config.task)
    task.load_state_dict(checkpoint["state_dict"])
    task.on_load_checkpoint(checkpoint)
    average.load_state_dict(checkpoint["callbacks"][average.state_key])
    return task


def report(directory: RunDirectory, config: DictConfig, images: ImageData, split: str, device: torch.device) -> None:
    """Evaluate the exported weights and write `report.json` and `report.html`."""
    model, description = load_model(directory.path)
    result = instantiate(config.evaluate.report)(
        model,
        images,
        directory.path,
        split=split,
        device=device,
        seed=config.seed,
        provenance={
            **provenance_of(config, description["provenance"]),
            "reference": {"dataset": str(config.data.source._target_).rpartition(".")[2]},
            "sampling": {key: description[key] for key in SAMPLING if key in description},
        },
    )
    write_report(result, directory.path)
    if "wandb" in config.logger:
        log_report(result, directory.path, config.logger.wandb)
    values = {entry["name"]: entry["value"] for entry in result["results"] if entry["value"] is not None}
    shown = [f"{name} {values[name]:.4g}" for name in config.evaluate.shown if name in values]
    console.print(f"{split}: {', '.join(shown)} ({result['status']})", highlight=False)
    console.print(f"report: {directory.path / 'report.html'}", highlight=False, soft_wrap=True)
