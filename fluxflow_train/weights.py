"""`model.safetensors` and `model.json`: the averaged weights and all that another program must know of them."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
PACKAGE = "fluxflow_train"
# What a description may build. Any other name is refused: it could run any function.
BUILDABLE = {
    f"{PACKAGE}.{name}"
    for name in (
        "models.vae.VAE",
        "models.vae.Encoder",
        "models.vae.Decoder",
        "models.fluxflow08.FluxFlow08VAE",
        "models.fluxflow08_flow.FluxFlow08Flow",
        "models.fluxflow08_text.FluxFlow08Text",
        "models.fluxflow08_text.published_distilbert",
        "models.text_to_image.TextToImage",
        "models.text.TextEncoder",
        "models.text_backbones.minilm",
        "models.text_backbones.distilbert",
        "models.text_backbones.FrozenBackbone",
        "models.text_backbones.TrainedBackbone",
        "models.text_scratch.ScratchBackbone",
        "models.flow.PillarTransformer",
        "models.dit.DiT",
        "objectives.RectifiedFlow",
        "objectives.VPrediction",
    )
}


def save_model(folder: Path, model: nn.Module, architecture: DictConfig, description: dict[str, Any]) -> None:
    """The description is written last: who finds it finds the weights whole."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    data = save(tensors, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, data)
    content = {
        "architecture": OmegaConf.to_container(architecture, resolve=True),
        **description,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(content, indent=2) + "\n").encode())


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model, in evaluation mode, and its description.

    Raises:
        UserError: files missing, damaged or not ours; or another text backbone than the model was trained with.
    """
    description = read_description(folder)
    with torch.random.fork_rng(devices=[]):
        model = build(description["architecture"])
    model.load_state_dict(read_tensors(folder, description))
    if "text_fingerprint" in description:
        model.text.check_fingerprint(description["text_fingerprint"])
    return model.to(memory_format=torch.channels_last).eval(), description


def load_weights(model: nn.Module, folder: str, sha256: str) -> None:
    """Fill `model` with the weights of the run in `folder`, which must have that hash.

    Raises:
        UserError: files missing or damaged, or the weights are others.
    """
    description = read_description(Path(folder))
    if description["sha256"] != sha256:
        raise UserError(f"{folder} holds other weights than this run began with: put those back, or begin another run")
    model.load_state_dict(read_tensors(Path(folder), description))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def read_description(folder: Path) -> dict[str, Any]:
    """`model.json`. Raises UserError where it is missing or damaged."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if not {"architecture", "sha256"} <= set(description):
            raise UserError(f"{folder / DESCRIPTION} describes no model of ours: give the folder of a finished run")
        return description
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the directory of a finished run") from error
        raise UserError(
            f"{error.filename} is missing: the run has not finished; resume it: python -m fluxflow_train run={folder}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise UserError(f"{folder}: the exported model is damaged ({error}): run the training command again") from error


def read_tensors(folder: Path, description: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that `description` is of. Raises UserError where they are missing, damaged or others."""
    try:
        data = (folder / WEIGHTS).read_bytes()
        tensors = load(data)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: run the training command again") from error
    except SafetensorError as error:
        raise UserError(f"{folder}: the exported model is damaged ({error}): run the training command again") from error
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise UserError(f"{folder}: {WEIGHTS} is not the file that {DESCRIPTION} describes: run training again")
    return tensors


def build(node: Any) -> Any:
    """The object that a description's dictionary with `_target_` stands for, its values built first.

    Raises:
        UserError: it asks for something that is no model of ours.
    """
    if isinstance(node, list):
        return [build(value) for value in node]
    if not isinstance(node, dict):
        return node
    arguments = {name: build(value) for name, value in node.items() if name != "_target_"}
    if "_target_" not in node:
        return arguments
    if str(node["_target_"]) not in BUILDABLE:
        raise UserError(f"{DESCRIPTION} asks for {node['_target_']}, which is no model of ours: do not use that folder")
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments)
