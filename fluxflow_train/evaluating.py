"""The bodies of `evaluate protocol=...` and `prepare reference=...`: from what was typed to an evaluation."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fluxflow_train import provenance
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation import run as evaluation
from fluxflow_train.evaluation.extractors import ExtractorOptions
from fluxflow_train.evaluation.place import Options
from fluxflow_train.evaluation.protocol import OWN, Protocol
from fluxflow_train.evaluation.protocol import load as load_protocol
from fluxflow_train.reports.wandb_log import log_report
from fluxflow_train.weights import read_description

console = Console(stderr=True)


def evaluate_by_protocol(cfg: DictConfig, run: Path, config: DictConfig) -> None:
    """Measure the run in `run`, of configuration `config`, on any number of ranks, into a folder of its own."""
    protocol, built = chosen_protocol(str(cfg.protocol), cfg)
    if cfg.data.root is not None:
        move_data(config, str(cfg.data.root))
    origin = read_description(run)["provenance"]
    result, folder = evaluation.evaluate_run(
        run,
        protocol,
        evaluation_options(cfg, cfg.data.num_workers),
        own=instantiate(config.data.source) if protocol.dataset == OWN else None,
        built=built,
        root=Path(config.data.root).expanduser(),
        provenance={
            **provenance_of(config, origin),
            "environment": {
                "git": provenance.git_state(),
                "git_training": origin["git"],
                "precision_training": config.trainer.precision,
            },
            "command": shlex.join(["python", "-m", "fluxflow_train.evaluate", *HydraConfig.get().overrides.task]),
            "resolution": config.data.module.resolution,
        },
    )
    if evaluation.is_first_rank():
        if "wandb" in config.logger:
            log_report(result, folder, config.logger.wandb)
        values = [
            f"{r['name']} {r['value']:.4g}" for r in result["results"] if r["value"] is not None and not r["baseline"]
        ]
        console.print(f"{protocol.id}: {', '.join(values)} ({result['status']})", highlight=False, soft_wrap=True)
        console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def prepare_reference(cfg: DictConfig) -> None:
    """Make the features of real images that a protocol's evaluations need."""
    protocol, built = chosen_protocol(str(cfg.reference), cfg)
    folder = evaluation.prepare_reference(
        protocol,
        cfg.scale.resolution,
        Options(device=cfg.device, extractor=extractor_options(cfg), num_workers=cfg.data.num_workers),
        own=instantiate(cfg.data.source) if protocol.dataset == OWN else None,
        built=built,
        root=Path(cfg.data.root).expanduser(),
    )
    if evaluation.is_first_rank():
        console.print(f"reference of {protocol.id}: {folder}", highlight=False, soft_wrap=True)


def chosen_protocol(name: str, cfg: DictConfig) -> tuple[Protocol, Any]:
    """The protocol with the command's extractor in place of its own, and that extractor where the user describes it."""
    protocol = load_protocol(name)
    chosen = {key: cfg.extractor[key] for key in ("name", "resizer") if cfg.extractor[key] is not None}
    if "name" in chosen:
        chosen["extractor"] = chosen.pop("name")
    protocol = dataclasses.replace(protocol, **chosen)
    return protocol, instantiate(protocol.extractor) if isinstance(protocol.extractor, dict) else None


def evaluation_options(cfg: DictConfig, num_workers: int) -> Options:
    """Raises UserError for a word where a number belongs."""
    for key in ("num_images", "steps", "seed"):
        if not isinstance(cfg[key], int) and (cfg[key] is not None or key == "seed"):
            raise UserError(f"{key}={cfg[key]} must be a whole number")
    return Options(
        num_images=cfg.num_images,
        guidance=evaluation.parse_guidance(OmegaConf.to_object(cfg).get("guidance")),  # type: ignore[union-attr]
        solver=cfg.solver,
        steps=cfg.steps,
        seed=cfg.seed,
        lpips=cfg.lpips,
        clip=cfg.clip,
        num_workers=num_workers,
        device=cfg.device,
        extractor=extractor_options(cfg),
    )


def extractor_options(cfg: DictConfig) -> ExtractorOptions:
    return ExtractorOptions(cfg.extractor.weights, cfg.extractor.allow_other_weights)


def move_data(config: DictConfig, root: str) -> None:
    """Read the run's data in another place than it was trained from."""
    config.data.root = root
    if "root" in config.data.source:
        config.data.source.root = root


def provenance_of(config: DictConfig, origin: dict[str, Any]) -> dict[str, Any]:
    """What a report says of how the weights came to be."""
    return {
        "command": origin["command"],
        "model": {k: v for k, v in origin.items() if k not in ("command", "git")} | {"ema": True},
        "environment": {"git": origin["git"], "precision_training": config.trainer.precision},
        "cost": {"seconds_training": origin["seconds_training"]},
    }
