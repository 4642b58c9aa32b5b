"""Models for other programs: a finished run as a FluxFlow 0.8 checkpoint, and such a checkpoint as a finished run."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.interop.fluxflow08 import Checkpoint08, load_checkpoint, save_checkpoint
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE
from fluxflow_train.models.fluxflow08_flow import FluxFlow08Flow
from fluxflow_train.models.fluxflow08_text import TEXT_WEIGHTS, FluxFlow08Text
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.weights import load_model, save_model

console = Console(stderr=True)

# How the published pipeline samples; the checkpoint does not say.
PUBLISHED_SAMPLING = {
    "objective": {
        "_target_": "fluxflow_train.objectives.VPrediction",
        "num_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "sampler": {"solver": "dpmpp_2m", "steps": 20, "guidance": 5.0, "micro_batch": 8},
    "cfg_dropout_prob": 0.1,
}


def export(cfg: DictConfig) -> None:
    """`format=fluxflow`: the run in `run` to a FluxFlow folder `out`; `format=run`: the other way."""
    source, out = Path(cfg.run).expanduser(), Path(cfg.out).expanduser()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"out={out} is not empty: name a new folder")
    if cfg.format == "fluxflow":
        done = to_fluxflow(source, out)
    elif cfg.format == "run":
        done = from_fluxflow(source, out, cfg.resolution)
    else:
        raise UserError(f"format is fluxflow or run, got {cfg.format}")
    console.print(done, highlight=False, soft_wrap=True)


def to_fluxflow(run: Path, out: Path) -> str:
    """Raises UserError where the run is not of FluxFlow 0.8's own networks."""
    model, description = load_model(run)
    parts = {"vae": model.vae, "flow": model.flow} if isinstance(model, TextToImage) else {"vae": model}
    kinds = {"vae": FluxFlow08VAE, "flow": FluxFlow08Flow}
    foreign = [f"{name} is a {type(part).__name__}" for name, part in parts.items() if type(part) is not kinds[name]]
    if foreign:
        raise UserError(
            f"FluxFlow 0.8 has no place for this model ({', '.join(foreign)}): only runs of "
            "+experiment=vae_fluxflow080, and of model/flow=fluxflow080 on them, can be exported so"
        )
    objective = description.get("objective", PUBLISHED_SAMPLING["objective"])
    if objective != PUBLISHED_SAMPLING["objective"]:
        raise UserError(
            f"{run} was trained with {objective['_target_'].rpartition('.')[2]}, and FluxFlow 0.8 samples with its own "
            "v-prediction schedule, which would draw noise: train with objective=v_prediction"
        )
    vae, flow = parts["vae"], parts.get("flow")
    text = model.text if isinstance(model, TextToImage) and isinstance(model.text, FluxFlow08Text) else None
    assert isinstance(vae, FluxFlow08VAE) and (flow is None or isinstance(flow, FluxFlow08Flow))
    save_checkpoint(out, vae, flow, text)
    without = " (without a text encoder: the run's own is none of FluxFlow's)" if flow and not text else ""
    return f"{', '.join(parts)} to {out}{without}"


def from_fluxflow(folder: Path, out: Path, resolution: int) -> str:
    """A run directory with the whole model, or the VAE alone where there is no flow or no text encoder."""
    checkpoint = load_checkpoint(folder)
    origin = {"provenance": {"experiment": folder.name, "command": f"imported from {folder}", "git": None, "seed": 0}}
    if checkpoint.flow is None or checkpoint.text is None:
        save_model(out, checkpoint.vae, OmegaConf.create(vae_architecture(checkpoint.vae)), origin)
        return f"the VAE to {out}: there is no flow with a text encoder in {folder}"
    model = TextToImage(checkpoint.vae, checkpoint.text, checkpoint.flow)
    description: dict[str, Any] = {**PUBLISHED_SAMPLING, **origin}
    description["sampler"] = description["sampler"] | {"resolution": resolution}
    description["text_fingerprint"] = checkpoint.text.backbone.fingerprint
    save_model(out, model, OmegaConf.create(architecture(checkpoint, folder)), description)
    return f"text, flow and VAE to {out}; its text backbone is read from {folder / TEXT_WEIGHTS}"


def vae_architecture(vae: FluxFlow08VAE) -> dict[str, Any]:
    names = ("vae_dim", "downscales", "upscales", "in_channels", "attn_layers", "max_hw")
    return described(vae, names)


def architecture(checkpoint: Checkpoint08, folder: Path) -> dict[str, Any]:
    """What `weights.build` makes the same modules from."""
    flow, text = checkpoint.flow, checkpoint.text
    assert flow is not None and text is not None
    names = ("latent_channels", "width", "num_heads", "text_width", "num_context_tokens")
    published = {
        "_target_": "fluxflow_train.models.fluxflow08_text.published_distilbert",
        "folder": str(folder.absolute()),
    }
    backbone = {"_target_": "fluxflow_train.models.text_backbones.FrozenBackbone", "checkpoint": published}
    return {
        "_target_": "fluxflow_train.models.text_to_image.TextToImage",
        "vae": vae_architecture(checkpoint.vae),
        "flow": described(flow, names) | {"num_layers": len(flow.blocks)},
        "text": described(text, ("width",)) | {"backbone": backbone, "num_tokens": text.backbone.max_tokens},
    }


def described(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    target = f"{type(module).__module__}.{type(module).__qualname__}"
    return {"_target_": target, **{name: getattr(module, name) for name in names}}
