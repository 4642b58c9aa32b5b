"""The bodies of the commands: train a run and export it, evaluate it, prepare its data."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fluxflow_train import provenance, rng
from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.composing import bind_vae, open_run, plain, refuse_impossible, refuse_unknown_split
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.errors import UserError
from fluxflow_train.evaluating import evaluate_by_protocol, prepare_reference, provenance_of
from fluxflow_train.hardware import device_of
from fluxflow_train.records import CSVRecords
from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.wandb_log import log_report
from fluxflow_train.run_directory import RunDirectory
from fluxflow_train.weights import load_model, load_weights, save_model

console = Console(stderr=True)

SAMPLING = ("objective", "sampler", "cfg_dropout_prob")  # what a report on generated pictures must know


def train(cfg: DictConfig) -> None:
    """Train, export, evaluate; or go on where the run directory stopped."""
    quieten()
    directory, config = open_run(cfg)
    torch.manual_seed(rng.torch_seed(config.seed, "weights"))
    task: Any = instantiate(config.task)
    images: ImageData = instantiate(config.data.module)
    data = task.data_module(images)
    loggers = list(instantiate(config.logger).values())
    callbacks = list(instantiate(config.callbacks).values())
    trainer = build_trainer(config, data, loggers, callbacks)
    refuse_impossible(config, task)
    console.print(headline(config, task, trainer, directory), highlight=False, soft_wrap=True)

    checkpoint = directory.checkpoint()
    images_seen = -1
    if checkpoint is not None:
        images_seen = torch.load(checkpoint, map_location="cpu", weights_only=True)["task"]["images_seen"]
        console.print(f"resuming at {images_seen:,} images from {checkpoint}", highlight=False, soft_wrap=True)
    for logger in loggers:
        if isinstance(logger, CSVRecords):
            logger.drop_after(images_seen)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise UserError(
            f"stopped at {task.images_seen:,} of {task.budget_images:,} images: "
            f"go on from the last checkpoint with python -m fluxflow_train run={directory.path}"
        ) from stop
    if trainer.is_global_zero:
        export(directory, config, task, images, trainer)
        if config.evaluate.split is not None:
            report(directory, config, images, config.evaluate.split, task.device)


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
    """Write the shards and the index of `data=...`; with `vae=...` also the latents and the text's hidden states."""
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
    data.prepare_data()
    for split in ("train", "tune", "test"):
        shards = data.source.shards(split)
        console.print(
            f"{split}: {data.num_samples(split):,} images in {len(shards)} shards, {Path(shards[0]).parent}",
            highlight=False,
            soft_wrap=True,
        )


# ---- training ----


def build_trainer(config: DictConfig, data: Any, loggers: list[Any], callbacks: list[L.Callback]) -> L.Trainer:
    between = math.ceil(config.scale.validate_every / data.batch_size)
    return instantiate(
        config.trainer,
        logger=loggers,
        callbacks=callbacks,
        val_check_interval=min(between, data.num_batches),
    )


def headline(config: DictConfig, task: Any, trainer: L.Trainer, directory: RunDirectory) -> str:
    """What is about to run, in one line."""
    sizes = " + ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
        for name, part in task.exported.named_children()
    )
    return (
        f"{config.name}: {sizes} parameters, {config.budget.images:,} images at {config.data.module.resolution} px, "
        f"{trainer.strategy.root_device} {config.trainer.precision}, in {directory.path}"
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
