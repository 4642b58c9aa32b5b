import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxflow_train.errors import UserError
from fluxflow_train.interop.fluxflow08 import METADATA, WEIGHTS, load_vae, save_vae
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE

ARCHITECTURE = {"vae_dim": 16, "downscales": 3, "upscales": 3, "max_hw": 1024, "vae_attn_layers": 2, "in_channels": 3}
FLOW = {"flow_dim": 16, "flow_transformer_layers": 1, "flow_attn_heads": 2, "text_embed_dim": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint written by us, without the peer."""
    torch.manual_seed(0)
    save_vae(FluxFlow08VAE(16, 3, 3, attn_layers=2), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A whole model written by the package itself."""
    versioning: Any = pytest.importorskip("fluxflow.models.versioning", reason="fluxflow==0.8.1 is not installed")
    models: Any = pytest.importorskip("fluxflow.models")
    torch.manual_seed(0)
    model = models.FluxPipeline(
        models.v080.FluxCompressor(d_model=16, downscales=3, attn_layers=2),
        models.v080.FluxFlowProcessor(d_model=16, vae_dim=16, embedding_size=32, n_head=2, n_layers=1),
        models.v080.FluxExpander(d_model=16, upscales=3),
    )
    path = tmp_path / "published"
    versioning.save_versioned_checkpoint(
        model, path, model_version="0.8.0", architecture=ARCHITECTURE | FLOW, training_info={"note": "kept"}
    )
    return path


def edit_metadata(folder: Path, **changes: Any) -> None:
    metadata = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(metadata | changes))


def test_our_own_round_trip(folder: Path, tmp_path: Path) -> None:
    vae = load_vae(folder)
    save_vae(vae, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata["architecture"] == ARCHITECTURE and "library_version" in metadata


def test_round_trip_of_a_published_model_returns_every_key(published: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    save_vae(load_vae(published), again, rest_from=published)
    before, after = load_file(published / WEIGHTS), load_file(again / WEIGHTS)
    assert before.keys() == after.keys() and any("flow_processor" in key for key in before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (json.loads((f / METADATA).read_text()) for f in (published, again))
    assert {k: v for k, v in new.items() if k != "checksum"} == {k: v for k, v in old.items() if k != "checksum"}


@pytest.mark.parametrize("with_rest", [True, False])
def test_the_package_opens_what_we_write(with_rest: bool, published: Path, tmp_path: Path) -> None:
    versioning: Any = pytest.importorskip("fluxflow.models.versioning")
    vae = load_vae(published)
    with torch.no_grad():  # a VAE trained further
        for parameter in vae.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save_vae(vae, tmp_path / "trained", rest_from=published if with_rest else None)
    model = versioning.load_versioned_checkpoint(tmp_path / "trained", device="cpu").eval()
    theirs, ours = model.state_dict(), load_file(tmp_path / "trained" / WEIGHTS)
    for key, tensor in ours.items():  # it loads with strict=False: a key it did not take would go unnoticed
        assert torch.equal(theirs[key.removeprefix("diffuser.")], tensor), key
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        torch.manual_seed(1)
        packed, mu, _ = model.compressor(x, training=True)
        torch.manual_seed(1)
        eps = torch.randn(2, vae.vae_dim, 2, 3)
        out = vae(x, torch.cat([eps, eps[:, :5]], dim=1))
        assert (out.mu - mu).abs().max() < 1e-5
        assert (out.x_hat - model.expander(packed)).abs().max() < 1e-5


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    edit_metadata(folder, checksum=None)


def change_shape(folder: Path) -> None:
    rewrite(folder, {"diffuser.expander.to_rgb_conv.6.bias": torch.zeros(4)})


def drop_key(folder: Path) -> None:
    rewrite(folder, {"diffuser.compressor.context_proj.weight": None})


def add_key(folder: Path) -> None:
    rewrite(folder, {"diffuser.expander.extra": torch.zeros(1)})


DAMAGES = {
    "damaged or cut short": truncate,
    r"to_rgb_conv.6.bias is \(4,\), expected \(3,\)": change_shape,
    "context_proj.weight is missing": drop_key,
    "extra is .*expected no such key": add_key,
    "model.safetensors can't be read": lambda folder: (folder / WEIGHTS).unlink(),
    "model_metadata.json can't be read": lambda folder: (folder / METADATA).unlink(),
    "not the metadata": lambda folder: (folder / METADATA).write_text("{"),
    "only 0.8 can be read": lambda folder: edit_metadata(folder, model_version="0.6.0"),
    "does not describe a VAE": lambda folder: edit_metadata(folder, architecture={"vae_dim": 16}),
    "expected .*weights must be of one": lambda folder: edit_metadata(
        folder, architecture=ARCHITECTURE | {"vae_dim": 24}
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_folder_that_is_no_checkpoint(message: str, folder: Path) -> None:
    DAMAGES[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value)


def test_a_checksum_that_does_not_fit(folder: Path) -> None:
    edit_metadata(folder, checksum={"weights_hash": "0" * 64, "algorithm": "sha256"})
    with pytest.raises(UserError, match="checksum"):
        load_vae(folder)


def test_the_rest_must_be_of_the_same_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit"):
        save_vae(FluxFlow08VAE(8, 3, 3), tmp_path / "other", rest_from=folder)
    assert not (tmp_path / "other").exists()
