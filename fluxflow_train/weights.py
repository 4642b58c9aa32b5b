"""`model.safetensors` and `model.json`: the averaged weights and all that another program must know of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.files import replacing, write_atomically

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
BUILDABLE = "fluxflow_train.models."


def save_model(folder: Path, model: nn.Module, architecture: DictConfig, description: dict[str, Any]) -> None:
    """The description is written last: who finds it finds the weights whole."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    content = {
        "architecture": OmegaConf.to_container(architecture, resolve=True),
        **description,
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(content, indent=2) + "\n").encode())


def load_model(folder: Path, build: Callable[[Any], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its description; `build` makes the module from its architecture (Hydra's `instantiate`).

    Raises:
        UserError: files missing, damaged or not ours.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing: the run has not finished; resume it: python -m fluxflow_train run={folder}"
        ) from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: the exported model is damaged ({error}): run the training command again") from error
    refuse_foreign(description["architecture"])
    with torch.random.fork_rng(devices=[]):
        model = build(description["architecture"])
    model.load_state_dict(tensors)
    return model.to(memory_format=torch.channels_last).eval(), description


def refuse_foreign(node: Any) -> None:
    """A description may build our models and nothing else: `_target_` would otherwise run any function."""
    if isinstance(node, dict):
        target = node.get("_target_", BUILDABLE)
        if not target.startswith(BUILDABLE):
            raise UserError(f"{DESCRIPTION} asks for {target}, which is none of {BUILDABLE}*: do not use it")
        for value in node.values():
            refuse_foreign(value)
