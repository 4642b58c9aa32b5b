"""From what the user composed to a run that can begin: its directory, its frozen VAE, its matched widths."""

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from fluxflow_train.ablation.cost import render, residual_table
from fluxflow_train.ablation.matching import match
from fluxflow_train.data.sources import SPLITS
from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.hardware import device_of, fastest_precision
from fluxflow_train.run_directory import RunDirectory, new_run_id, refuse_differences, resumed_config
from fluxflow_train.weights import DESCRIPTION, WEIGHTS, build, read_description

console = Console(stderr=True)


def open_run(cfg: DictConfig, lock: bool = True) -> tuple[RunDirectory, DictConfig]:
    """The run directory, new or again, and the resolved configuration that it holds.

    `lock` keeps other jobs out; a rank that follows another into a run has no lock of its own.
    """
    chosen = not OmegaConf.is_missing(cfg, "name")
    if cfg.run is None and not chosen:
        raise UserError("nothing to train: add +experiment=vae_bezier (--help lists all), or run=DIR to resume a run")
    run_id = cfg.run_id or new_run_id()
    directory = RunDirectory(Path(cfg.run or f"outputs/{cfg.name}/{run_id}").expanduser())
    if lock and directory.exists():
        directory.lock()
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
    if "vae" in cfg:
        if cfg.vae == "latest" and saved is not None:  # a VAE trained since the run began is not its VAE
            cfg.vae = saved.vae
        bind_vae(cfg)
    matched = match_widths(cfg)
    if saved is None:
        directory.create(cfg, overrides)
        if matched is not None:
            table = render(residual_table(*matched, instantiate(plain(cfg.matching.inputs)), device="cpu"))
            write_atomically(directory.path / "match.txt", f"{table}\n".encode())
            console.print(f"matched to the Bezier arm by {cfg.match}:\n{table}", highlight=False, soft_wrap=True)
    else:
        refuse_differences(cfg, saved, directory.path)
    return directory, plain(cfg)


def refuse_impossible(config: DictConfig, task: Any, world_size: int) -> None:
    """What would otherwise come out only after data were prepared, or after hours of training."""
    if config.evaluate.split is not None:
        refuse_unknown_split(config.evaluate.split)
    size = config.data.module.resolution
    batch, parts = config.data.module.batch_size, world_size * task.num_micro_batches
    if batch % parts:
        raise UserError(
            f"scale.batch_size={batch} can't be shared by {world_size} ranks x {task.num_micro_batches} micro batches: "
            f"make it a multiple of {parts}"
        )
    if size % task.stride:
        raise UserError(f"scale.resolution={size} is no multiple of the VAE's stride: give a multiple of {task.stride}")
    module = config.data.module
    if (module.resolutions is not None or module.bucket_aspect != 1) and module.bucket_step % task.stride:
        raise UserError(
            f"data.bucket_step={module.bucket_step} does not fit the VAE's stride: give a multiple of {task.stride}"
        )


def refuse_unknown_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"there is no split {split}: it is one of {', '.join(SPLITS)}")


def plain(cfg: DictConfig) -> DictConfig:
    """The same without interpolations, so that a part of it can be used alone."""
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def bind_vae(cfg: DictConfig) -> None:
    """Put the architecture, the latent channels and the hash of the VAE at `cfg.vae` into the configuration.

    `cfg.vae` is a run directory or its model.safetensors, or "latest": the VAE run under outputs/ exported last.

    Raises:
        UserError: there is no such run, it is no VAE's, or the flow was given other latent channels.
    """
    if not cfg.vae:
        raise UserError("a flow is trained on the latents of a VAE: say which with vae=DIR, its run directory")
    folder = latest_vae() if cfg.vae == "latest" else Path(cfg.vae).expanduser()
    if folder.name == WEIGHTS:
        folder = folder.parent
    if folder.is_file():
        raise UserError(f"vae={folder} is no exported model: give the run directory, whose {WEIGHTS} is used")
    description = read_description(folder)
    if "vae" in description["architecture"]:
        raise UserError(f"vae={folder} is a run of flow training: give the run directory of a VAE")
    cfg.vae, cfg.vae_sha256 = str(folder.absolute()), description["sha256"]
    cfg.model.vae = description["architecture"]
    with torch.device("meta"):
        vae: Any = build(description["architecture"])
    channels = OmegaConf.to_container(cfg.model.flow).get("latent_channels", "???")  # type: ignore[union-attr]
    if channels not in ("???", vae.latent_channels):
        raise UserError(
            f"model.flow.latent_channels={channels}, but the VAE in {folder} has {vae.latent_channels} latent "
            "channels: leave it out, the VAE decides"
        )
    cfg.model.flow.latent_channels = vae.latent_channels
    if OmegaConf.is_missing(cfg.model.flow, "num_context_tokens"):
        cfg.model.flow.num_context_tokens = vae.stride.bit_length() - 1


def latest_vae() -> Path:
    """The newest exported VAE under outputs/. Raises UserError where there is none."""
    described = sorted(Path("outputs").glob(f"*/*/{DESCRIPTION}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in described:
        if "vae" not in read_description(path.parent)["architecture"]:
            return path.parent
    raise UserError(
        "no trained VAE under outputs/: train one first with python -m fluxflow_train +experiment=vae_bezier, "
        "or say where it is with vae=DIR"
    )


def match_widths(cfg: DictConfig) -> tuple[nn.Module, nn.Module] | None:
    """Give another arm than Bezier the widths that make it as large as the Bezier arm.

    `cfg.matching` names the width (or list of widths) of each component and what the Bezier arm has in its place.
    Returns the Bezier network and the matched one, on the meta device; None where there is nothing to match.
    """
    if cfg.match not in ("parameters", "flops", "none"):
        raise UserError(f"match is parameters, flops or none, got {cfg.match}")
    matching, model = plain(cfg.matching), plain(cfg.model)
    reference = model.copy()
    for part, size in matching.sizes.items():
        if size in model[part]:  # else the part is of one size, on both sides
            reference[part] = bezier_arm(model[part], matching.reference[part], size)
    different = [part for part in matching.sizes if reference[part] != model[part]]
    if cfg.match == "none" or not different:
        return None

    def resized(**widths: list[int]) -> nn.Module:
        other = model.copy()
        for part, values in widths.items():
            key = matching.sizes[part]
            other[part][key] = values if OmegaConf.is_list(model[part][key]) else values[0]
        return instantiate(other)

    with torch.device("meta"):
        network = instantiate(reference)
    shapes = {part: model[part][matching.sizes[part]] for part in different}
    found = match(
        resized,
        network,
        widths={part: list(shape) if OmegaConf.is_list(shape) else [shape] for part, shape in shapes.items()},
        inputs=instantiate(matching.inputs),
        by=cfg.match,
        granularity=matching.granularity,
    )
    for part, values in found.widths.items():
        cfg.model[part][matching.sizes[part]] = values if OmegaConf.is_list(shapes[part]) else values[0]
    return network, found.network


def bezier_arm(part: DictConfig, theirs: DictConfig, size: str) -> DictConfig:
    """What the Bezier arm has in the place of `part`, under the same options.

    The part itself with `theirs.activation` wherever it has one; where it is of another class than `theirs`, theirs
    with all options that both have, but for `size`, which follows from the matching.
    """
    if theirs.get("_target_", part._target_) == part._target_:
        return with_activation(part, theirs.activation)
    shared = {key: part[key] for key in theirs if key in part and key not in ("_target_", "activation", size)}
    return OmegaConf.create({**theirs, **shared})


def with_activation(node: DictConfig, activation: str) -> DictConfig:
    """A copy with that in place of every `activation` in it, however deep."""

    def replaced(values: dict[Any, Any]) -> dict[Any, Any]:
        return {
            key: activation if key == "activation" else replaced(item) if isinstance(item, dict) else item
            for key, item in values.items()
        }

    return OmegaConf.create(replaced(OmegaConf.to_container(node)))  # type: ignore[arg-type]
