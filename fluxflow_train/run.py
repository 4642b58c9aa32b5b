"""What the commands share: compose a run, train it, export it, evaluate it."""

import itertools
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from fluxflow_train import provenance, rng
from fluxflow_train.ablation.cost import VAEInputs, render, residual_table
from fluxflow_train.ablation.matching import match
from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.sources import SPLITS
from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.hardware import device_of, fastest_precision
from fluxflow_train.pixels import dequantize
from fluxflow_train.records import CSVRecords
from fluxflow_train.reports.build import evaluate_vae, write_report
from fluxflow_train.run_directory import RunDirectory, new_run_id, refuse_differences, resumed_config
from fluxflow_train.weights import load_model, save_model

console = Console(stderr=True)

STATISTICS_IMAGES = 10_000  # of the training set, for the latent mean and standard deviation


def train(cfg: DictConfig) -> None:
    """Train, export, evaluate; or go on where the run directory stopped."""
    quieten()
    directory, config = open_run(cfg)
    torch.manual_seed(rng.torch_seed(config.seed, "weights"))
    task: Any = instantiate(config.task)
    data: ImageData = instantiate(config.data.module)
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
        export(directory, config, task, data, trainer)
        if config.evaluate.split is not None:
            report(directory, config, data, config.evaluate.split, task.device)


def evaluate(cfg: DictConfig) -> None:
    """Measure a finished run again."""
    quieten()
    refuse_unknown_split(cfg.split)
    directory = RunDirectory(Path(cfg.run).expanduser())
    config = plain(directory.config())
    data: ImageData = instantiate(config.data.module)
    data.prepare_data()
    report(directory, config, data, cfg.split, device_of(cfg.device))


def prepare(cfg: DictConfig) -> None:
    """Write the shards and the index of `data=...`."""
    data: ImageData = instantiate(cfg.data.module)
    data.prepare_data()
    for split in ("train", "tune", "test"):
        shards = data.source.shards(split)
        console.print(f"{split}: {data.num_samples(split):,} images in {len(shards)} shards, {Path(shards[0]).parent}")


# ---- composing ----


def open_run(cfg: DictConfig) -> tuple[RunDirectory, DictConfig]:
    """The run directory, new or again, and the resolved configuration that it holds."""
    chosen = not OmegaConf.is_missing(cfg, "name")
    if cfg.run is None and not chosen:
        raise UserError("nothing to train: add +experiment=vae_bezier (--help lists all), or run=DIR to resume a run")
    run_id = cfg.run_id or new_run_id()
    directory = RunDirectory(Path(cfg.run or f"outputs/{cfg.name}/{run_id}").expanduser())
    saved = directory.config() if directory.exists() else None
    if not chosen and saved is None:
        raise UserError(f"{directory.path} holds no run yet: add +experiment=vae_bezier to begin one there")
    overrides = list(HydraConfig.get().overrides.task)
    if saved is not None and not chosen:
        return directory, plain(resumed_config(cfg, saved, overrides))
    cfg.run, cfg.run_id = str(directory.path), saved.run_id if saved is not None else run_id
    if cfg.trainer.precision == "auto":
        device = device_of("cpu" if cfg.trainer.accelerator == "cpu" else "auto")
        cfg.trainer.precision = saved.trainer.precision if saved is not None else fastest_precision(device)
    matched = match_widths(cfg)
    if saved is None:
        directory.create(cfg, overrides)
        if matched is not None:
            inputs = VAEInputs(cfg.data.module.resolution, cfg.data.module.resolution)
            table = render(residual_table(*matched, inputs, device="cpu"))
            write_atomically(directory.path / "match.txt", f"{table}\n".encode())
            console.print(f"matched to the Bezier arm by {cfg.match}:\n{table}", highlight=False, soft_wrap=True)
    else:
        refuse_differences(cfg, saved, directory.path)
    return directory, plain(cfg)


def refuse_impossible(config: DictConfig, task: Any) -> None:
    """What would otherwise come out only after data were prepared, or after hours of training."""
    if config.evaluate.split is not None:
        refuse_unknown_split(config.evaluate.split)
    size = config.data.module.resolution
    if size % task.vae.stride:
        raise UserError(
            f"scale.resolution={size} is no multiple of the model's stride: give a multiple of {task.vae.stride}"
        )


def refuse_unknown_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"there is no split {split}: it is one of {', '.join(SPLITS)}")


def plain(cfg: DictConfig) -> DictConfig:
    """The same without interpolations, so that a part of it can be used alone."""
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def match_widths(cfg: DictConfig) -> tuple[nn.Module, nn.Module] | None:
    """Give another arm than Bezier the widths that make it as large as the Bezier arm.

    Returns the Bezier network and the matched one, on the meta device; None where there is nothing to match.
    """
    arms = {part: cfg.activation[part] for part in ("encoder", "decoder")}
    if cfg.match == "none" or all(arm == "bezier" for arm in arms.values()):
        return None
    if cfg.match not in ("parameters", "flops"):
        raise UserError(f"match is parameters, flops or none, got {cfg.match}")
    model = plain(cfg.model)
    like_bezier = model.copy()

    def build(**widths: list[int]) -> nn.Module:
        sized = model.copy()
        for part, values in widths.items():
            sized[part].widths = values
        return instantiate(sized)

    for part in arms:
        like_bezier[part].activation = "bezier"
    with torch.device("meta"):
        reference = instantiate(like_bezier)
    inputs = VAEInputs(cfg.data.module.resolution, cfg.data.module.resolution)
    found = match(
        build,
        reference,
        widths={part: list(model[part].widths) for part in arms},
        inputs=inputs,
        by=cfg.match,
        granularity=cfg.scale.vae.norm_groups,
    )
    for part, values in found.widths.items():
        cfg.model[part].widths = values
    return reference, found.network


def build_trainer(config: DictConfig, data: ImageData, loggers: list[Any], callbacks: list[L.Callback]) -> L.Trainer:
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
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for name, part in task.vae.named_children()
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
def export(directory: RunDirectory, config: DictConfig, task: Any, data: ImageData, trainer: L.Trainer) -> None:
    """Measure the latent statistics of the averaged weights and write `model.safetensors` and `model.json`."""
    average = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
    with average.averaged(task):
        measure_latents(task.vae, data, task.device)
        description = {
            "objective": None,
            "latent": {"mean": task.vae.latent_mean.tolist(), "std": task.vae.latent_std.tolist()},
            "provenance": {
                "experiment": config.name,
                "run_id": config.run_id,
                "images_seen": task.images_seen,
                "weights": "ema",
                "activation": OmegaConf.to_container(config.activation, resolve=True),
                "heads": config.heads,
                "reconstruction": config.task.reconstruction.path.rpartition(".")[2],
                "perceptual": "none" if config.task.perceptual is None else "lpips",
                "gan": "none" if config.task.adversary is None else "patch",
                "kl_weight": config.task.kl_weight,
                "precision": config.trainer.precision,
                "seed": config.seed,
                "seconds_training": round(task.seconds_training, 1),
                "command": directory.command(),
                "git": provenance.git_state(),
            },
        }
        save_model(directory.path, task.vae, config.model, description)


def measure_latents(vae: Any, data: ImageData, device: torch.device) -> None:
    """Set the per-channel mean and standard deviation of z = mu + sigma * eps over the first training images.

    In float64; the variance of z is that of mu plus the mean of sigma squared.
    """
    total = square = torch.zeros(vae.latent_channels, dtype=torch.float64, device=device)
    count = 0
    vae.eval()
    batches = itertools.islice(data.eval_dataloader("train"), math.ceil(STATISTICS_IMAGES / data.batch_size))
    for batch in batches:
        mu, logvar = (t.double() for t in vae.encoder(dequantize(batch["image"].to(device))))
        total = total + mu.sum(dim=(0, 2, 3))
        square = square + (mu.square() + logvar.exp()).sum(dim=(0, 2, 3))
        count += mu[:, 0].numel()
    mean = total / count
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_((square / count - mean.square()).clamp(min=1e-12).sqrt())


def report(directory: RunDirectory, config: DictConfig, data: ImageData, split: Any, device: torch.device) -> None:
    """Evaluate the exported weights and write `report.json` and `report.html`."""
    vae, description = load_model(directory.path, instantiate)
    origin = description["provenance"]
    result = evaluate_vae(
        vae,
        data,
        directory.path,
        split=split,
        device=device,
        seed=config.seed,
        provenance={
            "command": origin["command"],
            "model": {k: v for k, v in origin.items() if k not in ("command", "git")} | {"ema": True},
            "reference": {"dataset": str(config.data.source._target_).rpartition(".")[2]},
            "environment": {"git": origin["git"], "precision_training": config.trainer.precision},
            "cost": {"seconds_training": origin["seconds_training"]},
        },
    )
    write_report(result, directory.path)
    values = {entry["name"]: entry["value"] for entry in result["results"]}
    shown = [
        f"{name} {values[name]:.2f}" for name in ("psnr", "psnr_nonwhite", "psnr_pca", "rate_nats") if name in values
    ]
    console.print(f"{split}: {', '.join(shown)} ({result['status']})", highlight=False)
    console.print(f"report: {directory.path / 'report.html'}", highlight=False, soft_wrap=True)
