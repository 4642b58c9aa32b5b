"""Folders of FluxFlow 0.8: written by the package and read here, and the other way round."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import DistilBertConfig, DistilBertModel

from fluxflow_train.errors import UserError
from fluxflow_train.interop.fluxflow08 import METADATA, WEIGHTS, load_checkpoint, save_checkpoint
from fluxflow_train.models import fluxflow08_text
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE
from fluxflow_train.models.fluxflow08_flow import FluxFlow08Flow
from fluxflow_train.models.fluxflow08_text import TEXT_WEIGHTS, FluxFlow08Text, published_distilbert
from fluxflow_train.models.text import TextFeatures
from fluxflow_train.models.text_backbones import Checkpoint, TrainedBackbone

VAE_SIZES = {"vae_dim": 16, "downscales": 3, "upscales": 3, "max_hw": 1024, "vae_attn_layers": 2, "in_channels": 3}
FLOW_SIZES = {"flow_dim": 64, "flow_transformer_layers": 2, "flow_attn_heads": 4, "text_embed_dim": 32}
SMALL = {"vocab_size": 8, "n_layers": 1, "hidden_dim": 32, "dim": 64, "n_heads": 4}


def disturb(*nets: nn.Module) -> None:
    """Zeros and ones hide what is mixed up."""
    with torch.no_grad():
        for net in nets:
            for parameter in net.parameters():
                parameter += 0.02 * torch.randn_like(parameter)


def build_ours() -> tuple[FluxFlow08VAE, FluxFlow08Flow]:
    torch.manual_seed(0)
    nets = FluxFlow08VAE(16, 3, 3, attn_layers=2), FluxFlow08Flow(21, 64, 2, 4, 32, 3)
    disturb(*nets)
    return nets


def save_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "blue"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))


def build_text(folder: Path) -> FluxFlow08Text:
    """Upon DistilBERT of the size that is said to be base."""
    folder.mkdir()
    fields = dict(fluxflow08_text.DISTILBERT_BASE)
    network = DistilBertModel(DistilBertConfig(**fields))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    save_tokenizer(folder)
    text = FluxFlow08Text(TrainedBackbone(Checkpoint(folder, fields, lambda state: state)), 32, 512)
    disturb(text)
    return text.eval()


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone of the published kind and another size; the published one has 66 M parameters."""
    for name, value in SMALL.items():
        monkeypatch.setitem(fluxflow08_text.DISTILBERT_BASE, name, value)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint written by us, without the peer."""
    place = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        vae, flow = build_ours()
        save_checkpoint(place / "ours", vae, flow, build_text(place / "backbone"))
    return place / "ours"


@pytest.fixture
def folder(written: Path, tmp_path: Path, small: None) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "ours"))


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("fluxflow.models", reason="the peer fluxflow==0.8.1 is not installed")


@pytest.fixture
def published(tmp_path: Path, peer: Any) -> Path:
    """A model written by the package itself."""
    torch.manual_seed(0)
    model = peer.FluxPipeline(
        peer.v080.FluxCompressor(d_model=16, downscales=3, attn_layers=2),
        peer.v080.FluxFlowProcessor(d_model=64, vae_dim=16, embedding_size=32, n_head=4, n_layers=2, ctx_tokens=3),
        peer.v080.FluxExpander(d_model=16, upscales=3),
    )
    disturb(model)
    versioning: Any = pytest.importorskip("fluxflow.models.versioning")
    path = tmp_path / "published"
    versioning.save_versioned_checkpoint(model, path, model_version="0.8.0", architecture=VAE_SIZES | FLOW_SIZES)
    return path


def opened_by_the_package(folder: Path) -> Any:
    versioning: Any = pytest.importorskip("fluxflow.models.versioning")
    return versioning.load_versioned_checkpoint(folder, device="cpu").eval()


def edit_metadata(folder: Path, **changes: Any) -> None:
    metadata = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(metadata | changes))


def test_our_own_round_trip(folder: Path, tmp_path: Path) -> None:
    vae, flow, text = load_checkpoint(folder)
    save_checkpoint(tmp_path / "again", vae, flow, text)
    for name in (WEIGHTS, TEXT_WEIGHTS, METADATA, "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata["architecture"] == VAE_SIZES | FLOW_SIZES and "library_version" in metadata


def test_what_is_loaded_computes_what_was_saved(tmp_path: Path, small: None) -> None:
    vae, flow = build_ours()
    text = build_text(tmp_path / "backbone")
    save_checkpoint(tmp_path / "ours", vae, flow, text)
    loaded = load_checkpoint(tmp_path / "ours")
    assert loaded.flow is not None and loaded.text is not None
    captions = ["a red circle", "", "blue blue blue"]
    z, t = torch.randn(3, 21, 2, 3), torch.rand(3)
    with torch.no_grad():
        expected, found = text.encode(captions), loaded.text.encode(captions)
        assert len({row.sum().item() for row in found.pooled}) == 3
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        torch.testing.assert_close(loaded.text.null(2, 4).pooled[1], found.pooled[1], rtol=0, atol=1e-6)
        assert torch.equal(flow(z, t, expected), loaded.flow(z, t, found))
        assert torch.equal(vae.decode(z), loaded.vae.decode(z))


def test_loading_draws_nothing(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_checkpoint(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_round_trip_of_a_published_model_returns_every_key(published: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    save_checkpoint(again, *load_checkpoint(published))
    before, after = load_file(published / WEIGHTS), load_file(again / WEIGHTS)
    assert before.keys() == after.keys() and any("flow_processor" in key for key in before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (json.loads((f / METADATA).read_text()) for f in (published, again))
    different = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert different <= {"checksum", "library_version"}


def test_the_package_opens_what_we_write(peer: Any, tmp_path: Path) -> None:
    vae, flow = build_ours()
    save_checkpoint(tmp_path / "ours", vae, flow, None)
    model = opened_by_the_package(tmp_path / "ours")
    theirs, ours = model.state_dict(), load_file(tmp_path / "ours" / WEIGHTS)
    assert {f"diffuser.{key}" for key in theirs} == ours.keys()
    for key, tensor in theirs.items():  # it loads with strict=False: a key it did not take would go unnoticed
        assert torch.equal(ours[f"diffuser.{key}"], tensor), key

    z, t, pooled = torch.rand(2, 21, 2, 3) * 2 - 1, torch.tensor([0.2, 0.99]), torch.randn(2, 32)
    size = torch.zeros(2, 1, 21)
    size[..., 0], size[..., 1] = 2 / 1024, 3 / 1024
    packed = torch.cat([z.flatten(2).mT, size], dim=1)
    with torch.no_grad():
        moved = model.flow_processor(packed, pooled, t)
        found = flow(z, t, TextFeatures(pooled[:, None], torch.ones(2, 1, dtype=torch.bool), pooled))
        assert (found - moved[:, :-1].mT.reshape(z.shape)).abs().max() < 1e-5
        assert (vae.decode(z) - model.expander(packed)).abs().max() < 1e-5
        stepped = torch.cat([packed[:, :-1] - 0.1 * moved[:, :-1], size], dim=1)
        assert (vae.decode(z - 0.1 * found) - model.expander(stepped)).abs().max() < 1e-5
        x = torch.rand(2, 3, 16, 24) * 2 - 1
        torch.manual_seed(1)
        encoded, _, _ = model.compressor(x, training=True)
        torch.manual_seed(1)
        eps = torch.randn(2, vae.vae_dim, 2, 3)
        out = vae(x, torch.cat([eps, eps[:, :5]], dim=1))
        assert (out.x_hat - model.expander(encoded)).abs().max() < 1e-5


def test_a_vae_alone(peer: Any, tmp_path: Path) -> None:
    vae, _ = build_ours()
    save_checkpoint(tmp_path / "vae", vae, None, None)
    loaded = load_checkpoint(tmp_path / "vae")
    assert loaded.flow is None and loaded.text is None
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.vae.parameters(), strict=True))
    theirs = opened_by_the_package(tmp_path / "vae").state_dict()
    for key, tensor in load_file(tmp_path / "vae" / WEIGHTS).items():
        assert torch.equal(theirs[key.removeprefix("diffuser.")], tensor), key


def test_text_of_the_published_size(peer: Any, tmp_path: Path) -> None:
    """Written by the package's own class: read, and written again key for key, and under both of its key styles."""
    torch.manual_seed(0)
    vae, flow = build_ours()
    theirs = peer.BertTextEncoder(32).state_dict()
    save_checkpoint(tmp_path / "folder", vae, flow, None)
    save_tokenizer(tmp_path / "folder")
    for prefix in ("", "text_encoder."):
        save_file({f"{prefix}{k}": v.contiguous() for k, v in theirs.items()}, tmp_path / "folder" / TEXT_WEIGHTS)
        text = load_checkpoint(tmp_path / "folder").text
        assert text is not None
    save_checkpoint(tmp_path / "again", vae, flow, text)
    again = load_file(tmp_path / "again" / TEXT_WEIGHTS)
    assert again.keys() == {f"text_encoder.{key}" for key in theirs}
    assert all(torch.equal(again[f"text_encoder.{key}"], tensor) for key, tensor in theirs.items())


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    edit_metadata(path.parent, checksum=None)


def change_architecture(folder: Path, **changes: Any) -> None:
    edit_metadata(folder, architecture=VAE_SIZES | FLOW_SIZES | changes)


FLOW_BLOCK = "diffuser.flow_processor.transformer_blocks.1"
DAMAGES = {
    "model.safetensors is damaged or cut short": lambda f: truncate(f / WEIGHTS),
    r"to_rgb_conv.6.bias is \(4,\), expected \(3,\)": lambda f: rewrite(
        f / WEIGHTS, {"diffuser.expander.to_rgb_conv.6.bias": torch.zeros(4)}
    ),
    "context_proj.weight is missing": lambda f: rewrite(f / WEIGHTS, {"diffuser.compressor.context_proj.weight": None}),
    "1.cross_attn.q_proj.weight is missing": lambda f: rewrite(
        f / WEIGHTS, {f"{FLOW_BLOCK}.cross_attn.q_proj.weight": None}
    ),
    "extra is .*expected no such key": lambda f: rewrite(f / WEIGHTS, {"diffuser.expander.extra": torch.zeros(1)}),
    "not the same in every block": lambda f: rewrite(f / WEIGHTS, {f"{FLOW_BLOCK}.rotary_pe.inv_freq": torch.ones(8)}),
    "model.safetensors can't be read": lambda f: (f / WEIGHTS).unlink(),
    "model_metadata.json can't be read": lambda f: (f / METADATA).unlink(),
    "not the metadata": lambda f: (f / METADATA).write_text("{"),
    "model_metadata.json is not the metadata": lambda f: (f / METADATA).write_bytes(b"\xff\xfe\x00"),
    "only 0.8 can be read": lambda f: edit_metadata(f, model_version="0.6.0"),
    "does not describe a FluxFlow 0.8 model .'downscales'": lambda f: edit_metadata(f, architecture={"vae_dim": 16}),
    "does not describe .*num_heads": lambda f: change_architecture(f, flow_attn_heads=5),
    "does not describe a": lambda f: change_architecture(f, flow_attn_heads=0),
    "expected .*weights must be of one": lambda f: change_architecture(f, vae_dim=24),
    "transformer_blocks.2.* is missing": lambda f: change_architecture(f, flow_transformer_layers=3),
    "has not the checksum": lambda f: edit_metadata(f, checksum={"weights_hash": "0" * 64, "algorithm": "sha256"}),
    "no tokenizer.json: put that of distilbert": lambda f: (f / "tokenizer.json").unlink(),
    "text_encoder.safetensors is damaged": lambda f: truncate(f / TEXT_WEIGHTS),
    r"ouput_layer.1.bias is \[4\], expected \[2560\]": lambda f: rewrite(
        f / TEXT_WEIGHTS, {"text_encoder.ouput_layer.1.bias": torch.zeros(4)}
    ),
    "LayerNorm.weight is missing, expected": lambda f: rewrite(
        f / TEXT_WEIGHTS, {"text_encoder.language_model.embeddings.LayerNorm.weight": None}
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_folder_that_is_no_checkpoint(message: str, folder: Path) -> None:
    DAMAGES[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_what_can_not_be_put_together(folder: Path, tmp_path: Path) -> None:
    vae, flow, text = load_checkpoint(folder)
    assert flow is not None and text is not None
    out = tmp_path / "out"
    for wrong, name in (
        (FluxFlow08Flow(13, 64, 1, 4, 32, 3), "latent_channels is 13, not 21"),
        (FluxFlow08Flow(21, 64, 1, 4, 32, 4), "num_context_tokens is 4, not 3"),
        (FluxFlow08Flow(21, 64, 1, 4, 16, 3), "text_width is 16, not 32"),
    ):
        with pytest.raises(UserError, match=name):
            save_checkpoint(out, vae, wrong, text)
    with pytest.raises(UserError, match="without a flow"):
        save_checkpoint(out, vae, None, text)
    assert not out.exists()


def test_another_backbone_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_checkpoint(folder)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no other text backbone than distilbert-base-uncased, this one is 64 wide"):
        save_checkpoint(tmp_path / "out", *loaded)
    assert published_distilbert(str(folder)).width == 768
