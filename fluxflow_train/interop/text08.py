"""The text encoder of a FluxFlow 0.8 folder: `text_encoder.safetensors`, and a tokenizer that the package has by name.

`tokenizer.json` is ours: the package takes that of distilbert-base-uncased from the hub, here nothing is fetched.
"""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.interop import keys08
from fluxflow_train.interop.keys08 import Entry, State
from fluxflow_train.interop.keys08_flow import projection_entries
from fluxflow_train.models.fluxflow08_text import (
    DISTILBERT_BASE,
    LANGUAGE_MODEL,
    TEXT_PREFIX,
    TEXT_WEIGHTS,
    FluxFlow08Text,
    published_distilbert,
)
from fluxflow_train.models.text_backbones import TOKENIZER, Checkpoint, FrozenBackbone, PretrainedBackbone

PADDED_TOKENS = 512  # in the package's pipeline; its trainer pads to 128


def load_text(folder: Path, width: int) -> FluxFlow08Text | None:
    """The text encoder of `folder` with a frozen backbone, None where there is none.

    Raises:
        UserError: the file is damaged, of another width, or the tokenizer is missing.
    """
    path = folder / TEXT_WEIGHTS
    if not path.exists():
        return None
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} has a text encoder but no {TOKENIZER}: put that of distilbert-base-uncased there.")
    checkpoint = published_distilbert(str(folder))
    with torch.random.fork_rng(devices=[]):
        text = FluxFlow08Text(FrozenBackbone(checkpoint), width, PADDED_TOKENS)
    entries = keys08.under("", "projection.", projection_entries())
    like = {name: tensor for name, tensor in text.state_dict().items() if name.startswith("projection.")}
    text.load_state_dict(keys08.to_ours(entries, read_projection(path, checkpoint, entries, like), like))
    return text


def read_projection(path: Path, checkpoint: Checkpoint, entries: list[Entry], like: State) -> State:
    """The trained part by its names without prefix; the backbone's keys and shapes are checked, not read.

    Raises: UserError where the file is damaged or differs from what is wanted.
    """
    wanted = {name: list(tensor.shape) for name, tensor in keys08.to_theirs(entries, like).items()}
    with torch.device("meta"):
        backbone = checkpoint.build().state_dict()
    wanted |= {f"{LANGUAGE_MODEL}{name}": list(tensor.shape) for name, tensor in backbone.items()}
    try:
        with safe_open(path, "pt") as file:
            names = {name.removeprefix(TEXT_PREFIX): name for name in file.keys()}  # noqa: SIM118
            found = {short: file.get_slice(name).get_shape() for short, name in names.items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    raise UserError(
                        f"{path} is not the text encoder of this model: {name} is {found.get(name, 'missing')}, "
                        f"expected {wanted.get(name, 'no such key')}."
                    )
            return {e.theirs: file.get_tensor(names[e.theirs]) for e in entries}
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): get the file again.") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): get the file again.") from error


def text_files(text: FluxFlow08Text) -> dict[str, bytes]:
    """File names and contents.

    Raises:
        UserError: the backbone is not DistilBERT of base size, the only one that the package has.
    """
    backbone = text.backbone.inner
    if not isinstance(backbone, PretrainedBackbone) or backbone.checkpoint.fields != DISTILBERT_BASE:
        raise UserError(
            f"the FluxFlow package has no other text backbone than distilbert-base-uncased, this one is"
            f" {backbone.width} wide: train with model.text.backbone of that, or export without text."
        )
    state = keys08.to_theirs(keys08.under("", "projection.", projection_entries()), text.state_dict())
    state |= {f"{LANGUAGE_MODEL}{name}": tensor for name, tensor in network_of(backbone).state_dict().items()}
    tensors = {f"{TEXT_PREFIX}{name}": keys08.for_file(tensor) for name, tensor in state.items()}
    return {
        TEXT_WEIGHTS: safetensors.torch.save(tensors),
        TOKENIZER: (backbone.checkpoint.folder / TOKENIZER).read_bytes(),
    }


def network_of(backbone: PretrainedBackbone) -> nn.Module:
    return backbone.network() if isinstance(backbone, FrozenBackbone) else backbone.network  # type: ignore[return-value]
