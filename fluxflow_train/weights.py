"""`model.safetensors` and `model.json`: the averaged weights and all that another program must know of them."""

import hashlib
import json
from collections.abc import Callable
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
BUILDABLE = {f"fluxflow_train.models.{name}" for name in ("vae.VAE", "vae.Encoder", "vae.Decoder")}


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


def load_model(folder: Path, build: Callable[[Any], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its description; `build` makes the module from its architecture (Hydra's `instantiate`).

    Raises:
        UserError: files missing, damaged or not ours.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        data = (folder / WEIGHTS).read_bytes()
        tensors = load(data)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing: the run has not finished; resume it: python -m fluxflow_train run={folder}"
        ) from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: the exported model is damaged ({error}): run the training command again") from error
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise UserError(f"{folder}: {WEIGHTS} is not the file that {DESCRIPTION} describes: run training again")
    refuse_foreign(description["architecture"])
    with torch.random.fork_rng(devices=[]):
        model = build(description["architecture"])
    model.load_state_dict(tensors)
    return model.to(memory_format=torch.channels_last).eval(), description


def refuse_foreign(node: Any) -> None:
    """A description may build our models and nothing else: `_target_` would otherwise run any function."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in BUILDABLE:
            raise UserError(f"{DESCRIPTION} asks for {target}, which is no model of ours: do not use that folder")
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        refuse_foreign(value)
