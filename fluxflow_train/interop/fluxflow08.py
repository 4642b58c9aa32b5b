"""FluxFlow 0.8 checkpoint folders, in and out: `model.safetensors`, `model_metadata.json`, `text_encoder.safetensors`.

The package opens what is written here (`fluxflow.models.versioning.load_versioned_checkpoint`). It loads with
`strict=False`, so a key that is missing goes unnoticed there; here keys and shapes must match to the last one.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.interop import keys08, text08
from fluxflow_train.interop.keys08 import Entry, State
from fluxflow_train.interop.keys08_flow import flow_entries
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE
from fluxflow_train.models.fluxflow08_flow import FluxFlow08Flow
from fluxflow_train.models.fluxflow08_text import FluxFlow08Text

WEIGHTS, METADATA = "model.safetensors", "model_metadata.json"
LIBRARY_VERSION = "0.8.1"
PREFIX = "diffuser."
FLOW = "flow_processor."


class Checkpoint08(NamedTuple):
    """What a folder holds; `flow` and `text` are None where it holds none."""

    vae: FluxFlow08VAE
    flow: FluxFlow08Flow | None
    text: FluxFlow08Text | None


def load_checkpoint(folder: Path) -> Checkpoint08:
    """The models of a published folder; the weights of the text backbone are read when it first runs.

    Raises:
        UserError: a file is missing, cut short, of another version, or keys or shapes are not those of a 0.8 model.
    """
    metadata = read_metadata(folder)
    published = read_weights(folder, metadata)
    architecture = metadata["architecture"]
    with described_by(folder / METADATA), torch.random.fork_rng(devices=[]):
        vae = build_vae(architecture)
        flow = build_flow(architecture, vae) if "flow_dim" in architecture else None
        entries = model_entries(vae, flow)
        like = model_state(vae, flow)
    check_against(entries, like, published, folder / WEIGHTS)
    state = keys08.to_ours(entries, published, like)
    check_shared(entries, state, published, folder / WEIGHTS)
    vae.load_state_dict({name.removeprefix("vae."): t for name, t in state.items() if name.startswith("vae.")})
    if flow is None:
        return Checkpoint08(vae, None, None)
    flow.load_state_dict({name.removeprefix("flow."): t for name, t in state.items() if name.startswith("flow.")})
    return Checkpoint08(vae, flow, text08.load_text(folder, flow.text_width))


def save_checkpoint(folder: Path, vae: FluxFlow08VAE, flow: FluxFlow08Flow | None, text: FluxFlow08Text | None) -> None:
    """Write a folder that the package opens; where there is no flow, the package makes up a random one.

    Raises:
        UserError: the parts do not fit one another, or the text backbone is not the one that the package has.
    """
    check_fit(vae, flow, text)
    text_files = {} if text is None else text08.text_files(text)
    tensors = keys08.to_theirs(model_entries(vae, flow), model_state(vae, flow))
    weights = safetensors.torch.save({name: keys08.for_file(tensor) for name, tensor in tensors.items()})
    metadata = {
        "model_version": "0.8.0",
        "library_version": LIBRARY_VERSION,
        "architecture": architecture_of(vae, flow),
        "components": components_of(flow),
        "training_info": {},
        "checksum": {"weights_hash": hashlib.sha256(weights).hexdigest(), "algorithm": "sha256"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in text_files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / METADATA, json.dumps(metadata, indent=2).encode())


def check_fit(vae: FluxFlow08VAE, flow: FluxFlow08Flow | None, text: FluxFlow08Text | None) -> None:
    """Raises UserError unless the three are one published model."""
    if flow is None:
        if text is not None:
            raise UserError("a FluxFlow 0.8 folder has no place for a text encoder without a flow: export both")
        return
    pairs = {
        "latent_channels": (flow.latent_channels, vae.latent_channels),
        "num_context_tokens": (flow.num_context_tokens, vae.downscales),
        "text_width": (flow.text_width, flow.text_width if text is None else text.width),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise UserError(f"a FluxFlow 0.8 model can't be put together: the flow's {name} is {found}, not {expected}")


def architecture_of(vae: FluxFlow08VAE, flow: FluxFlow08Flow | None) -> dict[str, int]:
    sizes = {
        "vae_dim": vae.vae_dim,
        "downscales": vae.downscales,
        "upscales": vae.upscales,
        "max_hw": vae.max_hw,
        "vae_attn_layers": vae.attn_layers,
        "in_channels": vae.in_channels,
    }
    if flow is None:
        return sizes
    return sizes | {
        "flow_dim": flow.width,
        "flow_transformer_layers": len(flow.blocks),
        "flow_attn_heads": flow.num_heads,
        "text_embed_dim": flow.text_width,
    }


def components_of(flow: FluxFlow08Flow | None) -> dict[str, str]:
    parts = {"compressor": "FluxCompressor", "expander": "FluxExpander"}
    return parts if flow is None else parts | {"flow_processor": "FluxFlowProcessor_v080"}


def build_vae(architecture: dict[str, Any]) -> FluxFlow08VAE:
    """The defaults are those of the package's loader: two attention layers, where its constructor has four."""
    return FluxFlow08VAE(
        vae_dim=architecture["vae_dim"],
        downscales=architecture["downscales"],
        upscales=architecture["upscales"],
        in_channels=architecture.get("in_channels", 3),
        attn_layers=architecture.get("vae_attn_layers", 2),
        max_hw=architecture.get("max_hw", 1024),
    )


def build_flow(architecture: dict[str, Any], vae: FluxFlow08VAE) -> FluxFlow08Flow:
    return FluxFlow08Flow(
        latent_channels=vae.latent_channels,
        width=architecture["flow_dim"],
        num_layers=architecture["flow_transformer_layers"],
        num_heads=architecture["flow_attn_heads"],
        text_width=architecture["text_embed_dim"],
        num_context_tokens=vae.downscales,
    )


def model_entries(vae: FluxFlow08VAE, flow: FluxFlow08Flow | None) -> list[Entry]:
    """The map of the whole file, and of `model_state`."""
    entries = keys08.under(PREFIX, "vae.", keys08.vae_entries(vae))
    return entries if flow is None else entries + keys08.under(PREFIX + FLOW, "flow.", flow_entries(flow))


def model_state(vae: FluxFlow08VAE, flow: FluxFlow08Flow | None) -> State:
    state = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    return state if flow is None else state | {f"flow.{name}": tensor for name, tensor in flow.state_dict().items()}


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """A description that builds no model is one line to the user."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not describe a FluxFlow 0.8 model ({error}): get the file again.") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text())
        version = metadata["model_version"]
        metadata["architecture"]["vae_dim"]
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name a FluxFlow 0.8 checkpoint folder.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the metadata of a FluxFlow checkpoint: get the file again.") from error
    if not str(version).startswith("0.8."):
        raise UserError(f"{folder} holds a FluxFlow {version} model; only 0.8 can be read.")
    return metadata


def read_weights(folder: Path, metadata: dict[str, Any]) -> State:
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


def check_against(entries: list[Entry], like: State, published: State, path: Path) -> None:
    """Every key and shape of our model, and none beside them.

    Raises: UserError with the first difference.
    """
    shapes = {name: tensor.to("meta") for name, tensor in like.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in keys08.to_theirs(entries, shapes).items()}
    found = {name: tuple(tensor.shape) for name, tensor in published.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit its description: {name} is {found.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'no such key')}; {METADATA} and the weights must be of one checkpoint."
            )


def check_shared(entries: list[Entry], state: State, published: State, path: Path) -> None:
    """Raises UserError where one tensor of ours stands for several of theirs that differ."""
    for entry in entries:
        if not entry.at and not torch.equal(entry.to_ours(published[entry.theirs]), state[entry.ours]):
            raise UserError(f"{path}: {entry.theirs} is not the same in every block, as in all FluxFlow 0.8 models.")
