"""From a plan to its networks: every arm composed at every size, its widths solved once for all seeds."""

import secrets
from typing import Any

import torch
from hydra import compose
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fluxflow_train import provenance
from fluxflow_train.ablation import cost
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.plan import Plan
from fluxflow_train.cli import one_line, suggestion
from fluxflow_train.composing import match_widths, plain
from fluxflow_train.errors import UserError
from fluxflow_train.hardware import device_of, fastest_precision
from fluxflow_train.reports.protocol import environment

TIMED_BATCH = 16  # at most, so that large networks can be timed on small machines
AXES = {"parameters": "parameters", "flops": "FLOPs per image", "latency": "seconds per image", "none": "parameters"}


def freeze(plan: Plan, trainer: str | None = None, timed: bool = False) -> Frozen:
    """Solve all networks of the plan, and fix the precision of its runs to what `trainer` has on this machine.

    With `timed`, `seconds_per_image` of a training step is measured on this machine.

    Raises:
        UserError: an override of the plan is none, or widths can't be matched; the message names arm and size.
    """
    where = [] if trainer is None else [f"trainer={trainer}"]
    vaes: dict[str, dict[str, Any]] = {}
    vae_model: DictConfig | None = None
    if plan.vaes is not None:
        for name, own in plan.vaes.arms.items():
            options = [f"+experiment={plan.vaes.experiment}", *plan.vaes.overrides, *own, *where]
            cfg = composed(plan, f"vaes.arms.{name}", options)
            vaes[name], model = solved(cfg, f"VAE {name}", timed)
            vae_model = vae_model or model
    networks: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, own in plan.arms.items():
        networks[arm] = {}
        for size, widths in plan.sizes.items():
            options = [f"+experiment={plan.experiment}", *plan.overrides, *widths, *own, *where]
            cfg = composed(plan, f"arms.{arm} at size {size}", options)
            if vae_model is not None:
                hang_on(cfg, vae_model)
            networks[arm][size], _ = solved(cfg, f"arm {arm} at size {size}", timed)
            more = networks[arm][size]["match_ratio"]
            if plan.decision.size_ratio is not None and more != 1:
                raise UserError(
                    f"arm {arm} has match_ratio={more:g}: a size ratio is told from arms of equal cost; set "
                    "decision.size_ratio to null to ask whether this arm is equal"
                )
    cfg = composed(plan, "overrides", [f"+experiment={plan.experiment}", *plan.overrides, *where])
    precision = cfg.trainer.precision
    if precision == "auto":
        precision = fastest_precision(device_of("cpu" if cfg.trainer.accelerator == "cpu" else "auto"))
    origin = {
        "id": secrets.token_hex(4),
        "git": provenance.git_state(),
        "environment": environment(torch.device("cpu")),
        "axis": AXES[plan.match],
        "precision": precision,
    }
    return Frozen(plan, networks, vaes, origin)


def composed(plan: Plan, where: str, overrides: list[str]) -> DictConfig:
    """The training configuration; what is wrong with an override is said in one line."""
    try:
        return compose("train", [f"match={plan.match}", f"match_tolerance={plan.tolerance}", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"plan {plan.name}, {where}: {one_line(error)}{suggestion(error)}") from error


def hang_on(cfg: DictConfig, vae_model: DictConfig) -> None:
    """Give a flow the VAE that is still to be trained: its architecture decides the latents' shape."""
    cfg.model.vae = vae_model
    with torch.device("meta"):
        vae: Any = instantiate(vae_model)
    cfg.model.flow.latent_channels = vae.latent_channels


def solved(cfg: DictConfig, what: str, timed: bool) -> tuple[dict[str, Any], DictConfig]:
    """What the plan keeps of a network, and its configuration with the widths in it."""
    try:
        matched = match_widths(cfg)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    with torch.device("meta"):
        network = matched.network if matched is not None else instantiate(plain(cfg.model))
    reference = matched.reference if matched is not None else network
    parts = list(cfg.matching.sizes) or [name for name, _ in network.named_children()]
    inputs = instantiate(plain(cfg.matching.inputs))

    def parameters(net: nn.Module) -> int:
        counts = cost.parameters(net)
        return sum(counts[part] for part in parts)

    def flops(net: nn.Module) -> int:
        counts = cost.flops(net, inputs)
        return sum(counts[part] for part in parts)

    device = str(device_of("cpu" if cfg.trainer.accelerator == "cpu" else "auto"))
    if cfg.match == "latency":  # a time is never twice equal: what was measured in turn is what counts
        theirs = cost.latency(reference, inputs, device)
        residual = 0.0 if matched is None else matched.residuals["total"]
        ours = theirs * cfg.match_ratio * (1 + residual)
    else:
        count = flops if cfg.match == "flops" else parameters
        ours, theirs = float(count(network)), float(count(reference))
        residual = ours / theirs / cfg.match_ratio - 1
    widths = [
        f"model.{part}.{key}={as_override(cfg.model[part][key])}"
        for part, keys in cfg.matching.sizes.items()
        for key in keys
        if key in cfg.model[part]
    ]
    solution = {
        "overrides": widths,
        "cost": ours,
        "reference_cost": theirs,
        "residual": residual,
        "match_ratio": float(cfg.match_ratio),
        "parameters": parameters(network),
        "flops": flops(network),
        "activation_bytes": cost.activation_bytes(network, inputs),
        "batch_size": int(cfg.scale.batch_size),
    }
    if timed:
        batch_size = min(int(cfg.scale.batch_size), TIMED_BATCH)
        solution["seconds_per_image"] = cost.training_latency(network, inputs, batch_size, device)
    return solution, plain(cfg.model)


def as_override(value: Any) -> str:
    """A width or a list of widths, as Hydra reads it."""
    return f"[{','.join(str(width) for width in value)}]" if OmegaConf.is_list(value) else str(value)
