"""`model.safetensors` and `model.json`: what goes in comes out, and nothing else is let in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxflow_train import weights
from fluxflow_train.errors import UserError


@pytest.fixture
def copy(vae_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(vae_run / name, folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | changes))


def test_model_comes_back_from_its_folder_alone(copy: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, description = weights.load_model(copy)
    assert torch.equal(torch.rand(1), expected)  # building it draws nothing from the global generator
    assert not model.training
    stored = load_file(copy / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert description["provenance"]["images_seen"] == 32


def test_weights_fill_a_network_that_stands(copy: Path) -> None:
    sha256 = weights.read_description(copy)["sha256"]
    model, _ = weights.load_model(copy)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    weights.load_weights(model, str(copy), sha256)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="holds other weights than this run began with"):
        weights.load_weights(model, str(copy), "0" * 64)


def test_weights_that_the_description_is_not_of_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is not the file that model.json describes"):
        weights.load_model(copy)
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        weights.load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        weights.load_model(copy)


@pytest.mark.parametrize(
    "architecture",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "fluxflow_train.models.vae.VAE", "encoder": {"_target_": "os.system"}},
        {"_target_": "fluxflow_train.models.vae.VAE", "encoder": [{"_target_": "builtins.exec"}]},
        {"_target_": "fluxflow_train.weights.build", "node": {}},
        {"_target_": ["os.system"]},
    ],
)
def test_nothing_but_models_of_ours_is_built(copy: Path, architecture: Any) -> None:
    edit(copy, architecture=architecture)
    with pytest.raises(UserError, match="no model of ours"):
        weights.load_model(copy)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"architecture": {}}', "\xff"])
def test_description_that_is_none(copy: Path, content: str) -> None:
    (copy / "model.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"damaged|no model of ours"):
        weights.load_model(copy)


def test_folder_that_is_not_there_and_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nothing"):
        weights.load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"the run has not finished; resume it"):
        weights.load_model(tmp_path)
