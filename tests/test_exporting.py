"""The export command: a run of the 0.8 networks to a FluxFlow folder and back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fluxflow_train.exporting import vae_architecture
from fluxflow_train.interop.fluxflow08 import load_checkpoint
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE
from fluxflow_train.weights import build, load_model, save_model

FLOW = {
    "_target_": "fluxflow_train.models.fluxflow08_flow.FluxFlow08Flow",
    "latent_channels": 21,
    "width": 64,
    "num_layers": 2,
    "num_heads": 4,
    "text_width": 16,
    "num_context_tokens": 2,
}
BACKBONE = {
    "_target_": "fluxflow_train.models.text_scratch.ScratchBackbone",
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "hidden": 16,
    "activation": "bezier",
}
TEXT = {
    "_target_": "fluxflow_train.models.text.TextEncoder",
    "backbone": BACKBONE,
    "width": 16,
    "hidden": 16,
    "activation": "bezier",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of the published VAE and flow on a text encoder of ours."""
    torch.manual_seed(0)
    vae = FluxFlow08VAE(16, 2, 2, attn_layers=1)
    parts = {"vae": vae_architecture(vae), "text": TEXT, "flow": FLOW}
    architecture = {"_target_": "fluxflow_train.models.text_to_image.TextToImage", **parts}
    folder = tmp_path / "run"
    folder.mkdir()
    save_model(folder, build(architecture), OmegaConf.create(architecture), {})
    return folder


def test_there_and_back(run: Path, tmp_path: Path, command: Callable) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    answer = command("fluxflow_train.export", f"run={run}", f"out={there}")
    assert answer.code == 0 and "without a text encoder" in answer.output
    model, _ = load_model(run)
    loaded = load_checkpoint(there)
    assert loaded.flow is not None and loaded.text is None
    for ours, theirs in ((model.vae, loaded.vae), (model.flow, loaded.flow)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    answer = command("fluxflow_train.export", f"run={there}", "format=run", f"out={back}")
    assert answer.code == 0 and "the VAE" in answer.output
    vae, description = load_model(back)
    assert description["architecture"]["_target_"].endswith("FluxFlow08VAE")
    z = torch.randn(1, 21, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z), model.vae.decode(z), rtol=0, atol=1e-6)


def test_the_package_opens_it(run: Path, tmp_path: Path, command: Callable) -> None:
    versioning = pytest.importorskip("fluxflow.models.versioning", reason="the fluxflow package is not installed")
    assert command("fluxflow_train.export", f"run={run}", f"out={tmp_path / 'out'}").code == 0
    opened = versioning.load_versioned_checkpoint(str(tmp_path / "out"))
    model, _ = load_model(run)
    z = torch.rand(1, 21, 4, 4) * 2 - 1
    packed = torch.cat([z.flatten(2).mT, torch.tensor([4 / 1024, 4 / 1024] + [0.0] * 19).expand(1, 1, 21)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(opened.expander.eval()(packed), model.vae.decode(z), rtol=0, atol=1e-5)


def test_what_has_no_place_there(run: Path, tmp_path: Path, command: Callable) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for arguments, message in (
        ((f"run={run}", "format=onnx", f"out={tmp_path / 'x'}"), "format is fluxflow or run"),
        ((f"run={run}", f"out={full}"), "is not empty"),
        ((f"run={tmp_path / 'none'}", f"out={tmp_path / 'x'}"), "there is no folder"),
        ((f"run={full}", "format=run", f"out={tmp_path / 'x'}"), "model_metadata.json can't be read"),
    ):
        answer = command("fluxflow_train.export", *arguments)
        assert answer.code == 1 and message in answer.output and answer.output.count("\n") == 1


def test_a_flow_that_theirs_would_sample_as_noise_is_refused(run: Path, tmp_path: Path, command: Callable) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    model, description = load_model(run)
    objective = {"_target_": "fluxflow_train.objectives.RectifiedFlow", "shift": 1.0}
    save_model(straight, model, OmegaConf.create(description["architecture"]), {"objective": objective})
    answer = command("fluxflow_train.export", f"run={straight}", f"out={tmp_path / 'out'}")
    assert answer.code == 1 and answer.output.count("\n") == 1
    assert "trained with RectifiedFlow" in answer.output and "objective=v_prediction" in answer.output
    assert not (tmp_path / "out").exists()


def test_a_model_of_our_own_is_refused(tmp_path: Path, command: Callable) -> None:
    dit = {
        "_target_": "fluxflow_train.models.dit.DiT",
        "latent_channels": 21,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "text_width": 16,
        "mlp_width": 16,
    }
    vae = vae_architecture(FluxFlow08VAE(16, 2, 2, attn_layers=1))
    architecture = {
        "_target_": "fluxflow_train.models.text_to_image.TextToImage",
        "vae": vae,
        "text": TEXT,
        "flow": dit,
    }
    folder = tmp_path / "run"
    folder.mkdir()
    save_model(folder, build(architecture), OmegaConf.create(architecture), {})
    answer = command("fluxflow_train.export", f"run={folder}", f"out={tmp_path / 'x'}")
    assert answer.code == 1 and "flow is a DiT" in answer.output and not (tmp_path / "x").exists()
