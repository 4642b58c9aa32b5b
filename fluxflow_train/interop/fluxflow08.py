"""FluxFlow 0.8 checkpoint folders: `model.safetensors` and `model_metadata.json`, in and out.

The package opens what is written here (`fluxflow.models.versioning.load_versioned_checkpoint`). It loads with
`strict=False`, so a key that is missing goes unnoticed there; here keys and shapes must match to the last one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.interop import keys08
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE

WEIGHTS, METADATA = "model.safetensors", "model_metadata.json"
LIBRARY_VERSION = "0.8.1"
OWN_PARTS = tuple(f"{keys08.PREFIX}{part}." for part in ("compressor", "expander"))


def load_vae(folder: Path) -> FluxFlow08VAE:
    """The VAE of a published folder; its other parts (the flow) are left alone.

    Raises:
        UserError: a file is missing, cut short, of another version, or its keys or shapes are not those of a 0.8 VAE.
    """
    metadata = read_metadata(folder)
    vae = build(folder, metadata["architecture"])
    published = read_weights(folder, metadata)
    check_against(vae, published, folder / WEIGHTS)
    vae.load_state_dict(keys08.to_ours(vae, published))
    return vae


def save_vae(vae: FluxFlow08VAE, folder: Path, rest_from: Path | None = None) -> None:
    """Write a folder that the package opens.

    Everything that is no part of a VAE (the flow's weights, its sizes, training notes) is copied from `rest_from`, the
    folder that this VAE came from. Without it the folder holds a VAE alone, and the package makes up a random flow.

    Raises:
        UserError: `rest_from` can't be read, or holds a VAE of another size.
    """
    tensors, metadata = keys08.to_theirs(vae), empty_metadata()
    if rest_from is not None:
        metadata = read_metadata(rest_from)
        published = read_weights(rest_from, metadata)
        check_against(vae, published, rest_from / WEIGHTS)
        tensors |= {name: tensor for name, tensor in published.items() if not name.startswith(OWN_PARTS)}
    metadata["architecture"] |= {
        "vae_dim": vae.vae_dim,
        "downscales": vae.downscales,
        "upscales": vae.upscales,
        "max_hw": vae.max_hw,
        "vae_attn_layers": vae.attn_layers,
        "in_channels": vae.in_channels,
    }
    weights = safetensors.torch.save(tensors)
    metadata["checksum"] = {"weights_hash": hashlib.sha256(weights).hexdigest(), "algorithm": "sha256"}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / METADATA, json.dumps(metadata, indent=2).encode())


def empty_metadata() -> dict[str, Any]:
    return {
        "model_version": "0.8.0",
        "library_version": LIBRARY_VERSION,
        "architecture": {},
        "components": {"compressor": "FluxCompressor", "expander": "FluxExpander"},
        "training_info": {},
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text())
        version = metadata["model_version"]
        metadata["architecture"]["vae_dim"]
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name a FluxFlow 0.8 checkpoint folder.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the metadata of a FluxFlow checkpoint: get the file again.") from error
    if not str(version).startswith("0.8."):
        raise UserError(f"{folder} holds a FluxFlow {version} model; only 0.8 can be read.")
    return metadata


def read_weights(folder: Path, metadata: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the file, which must have the checksum that the metadata gives, if they give one."""
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name a FluxFlow 0.8 checkpoint folder.") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): get the file again.") from error
    expected = (metadata.get("checksum") or {}).get("weights_hash")
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{path} has not the checksum that {METADATA} gives: get both files again.")
    return tensors


def build(folder: Path, architecture: dict[str, Any]) -> FluxFlow08VAE:
    """The defaults are those of the package's loader: two attention layers, where its constructor has four."""
    try:
        return FluxFlow08VAE(
            vae_dim=architecture["vae_dim"],
            downscales=architecture["downscales"],
            upscales=architecture["upscales"],
            in_channels=architecture.get("in_channels", 3),
            attn_layers=architecture.get("vae_attn_layers", 2),
            max_hw=architecture.get("max_hw", 1024),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / METADATA} does not describe a VAE ({error}): get the file again.") from error


def check_against(vae: FluxFlow08VAE, published: dict[str, Tensor], path: Path) -> None:
    """Every key and shape of the VAE, and none beside them.

    Raises: UserError with the first difference.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in keys08.to_theirs(vae).items()}
    found = {name: tuple(tensor.shape) for name, tensor in published.items() if name.startswith(OWN_PARTS)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit its description: {name} is {found.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'no such key')}; {METADATA} and the weights must be of one checkpoint."
            )
