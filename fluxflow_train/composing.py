"""From what the user composed to a run that can begin: its directory, its frozen VAE, its matched widths."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from fluxflow_train.ablation.cost import render, residual_table
from fluxflow_train.ablation.latency import match_latency
from fluxflow_train.ablation.matching import Match, match
from fluxflow_train.ablation.plan import MATCHINGS
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
    matched = match_widths(cfg, saved)
    if saved is None:
        directory.create(cfg, overrides)
        if matched is not None:
            table = render(
                residual_table(
                    matched.reference, matched.network, instantiate(plain(cfg.matching.inputs)), device="cpu"
                )
            )
            write_atomically(directory.path / "match.txt", f"{table}\n".encode())
            ratio = "" if cfg.match_ratio == 1 else f" at {cfg.match_ratio:g} times its cost"
            console.print(f"matched to the Bezier arm by {cfg.match}{ratio}:\n{table}", highlight=False, soft_wrap=True)
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


class Matched(NamedTuple):
    """The Bezier network and the one matched to it, on the meta device; relative differences of what was matched."""

    reference: nn.Module
    network: nn.Module
    residuals: dict[str, float]


def match_widths(cfg: DictConfig, saved: DictConfig | None = None) -> Matched | None:
    """Give another arm than Bezier the widths that make it as large as the Bezier arm, or `match_ratio` times that.

    `cfg.matching` names the widths of each component, in the order in which they are freed, and what the Bezier arm has
    in its place. A run that is `saved` keeps widths that were measured. None where there is nothing to match.

    Raises:
        UserError: no widths are near enough.
    """
    if cfg.match not in MATCHINGS:
        raise UserError(f"match is {', '.join(MATCHINGS[:-1])} or {MATCHINGS[-1]}, got {cfg.match}")
    if cfg.match == "latency" and saved is not None:
        cfg.model = saved.model
        return None
    matching, model = plain(cfg.matching), plain(cfg.model)
    reference = model.copy()
    for part, keys in matching.sizes.items():
        if keys[0] in model[part]:  # else the part is of one size, on both sides
            reference[part] = bezier_arm(model[part], matching.reference[part], keys)
        reference[part] = OmegaConf.merge(reference[part], (matching.reference_options or {}).get(part, {}))
    different = [
        part
        for part, keys in matching.sizes.items()
        if keys[0] in model[part] and (reference[part] != model[part] or cfg.match_ratio != 1)
    ]
    if cfg.match == "none" or not different:
        return None
    with torch.device("meta"):
        network = instantiate(reference)
    tries = max(len(matching.sizes[part]) for part in different)
    for number in range(1, tries + 1):
        freed = {part: matching.sizes[part][:number] for part in different}
        try:
            found = _matched(cfg, matching, model, freed, network)
        except UserError:
            if number == tries:
                raise
            continue
        for part, values in found.widths.items():
            _put(cfg.model[part], freed[part], values)
        return Matched(network, found.network, found.residuals)
    raise AssertionError("a component has no widths")


def _matched(
    cfg: DictConfig, matching: DictConfig, model: DictConfig, freed: dict[str, list[str]], reference: nn.Module
) -> Match:
    """The widths under the keys `freed` of each part that bring `model` to the cost of `reference`."""

    def resized(**widths: list[int]) -> nn.Module:
        other = model.copy()
        for part, values in widths.items():
            _put(other[part], freed[part], values)
        return instantiate(other)

    widths: dict[str, list[int]] = {}
    steps: dict[str, list[int]] = {}
    for part, keys in freed.items():
        values = [model[part][key] for key in keys]
        widths[part] = [width for value in values for width in (value if OmegaConf.is_list(value) else [value])]
        steps[part] = [
            matching.granularity[key]
            for key, value in zip(keys, values, strict=True)
            for _ in (value if OmegaConf.is_list(value) else [value])
        ]
    inputs = instantiate(matching.inputs)
    if cfg.match == "latency":
        return match_latency(
            resized,
            reference,
            widths=widths,
            inputs=inputs,
            tolerance=cfg.match_tolerance,
            steps={part: np.array(values) for part, values in steps.items()},
            ratio=cfg.match_ratio,
            device=str(device_of("cpu" if cfg.trainer.accelerator == "cpu" else "auto")),
        )
    return match(
        resized,
        reference,
        widths=widths,
        inputs=inputs,
        by=cfg.match,
        tolerance=cfg.match_tolerance,
        granularity=steps,
        ratio=cfg.match_ratio,
    )


def _put(part: DictConfig, keys: list[str], values: list[int]) -> None:
    """Hand the flat list of widths out to the keys, each a width or a list of them."""
    left = list(values)
    for key in keys:
        count = len(part[key]) if OmegaConf.is_list(part[key]) else 1
        part[key] = left[:count] if OmegaConf.is_list(part[key]) else left[0]
        del left[:count]


def bezier_arm(part: DictConfig, theirs: DictConfig, sizes: list[str]) -> DictConfig:
    """What the Bezier arm has in the place of `part`, under the same options.

    The part itself with `theirs.activation` wherever it has one; where it is of another class than `theirs`, theirs
    with all options that both have, but for the first of `sizes`, which follows from the matching.
    """
    if theirs.get("_target_", part._target_) == part._target_:
        return with_activation(part, theirs.activation)
    shared = {key: part[key] for key in theirs if key in part and key not in ("_target_", "activation", sizes[0])}
    return OmegaConf.create({**theirs, **shared})


def with_activation(node: DictConfig, activation: str) -> DictConfig:
    """A copy with that in place of every `activation` in it, however deep."""

    def replaced(values: dict[Any, Any]) -> dict[Any, Any]:
        return {
            key: activation if key == "activation" else replaced(item) if isinstance(item, dict) else item
            for key, item in values.items()
        }

    return OmegaConf.create(replaced(OmegaConf.to_container(node)))  # type: ignore[arg-type]
