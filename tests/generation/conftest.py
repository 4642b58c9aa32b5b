"""A small text-to-image model with random weights, in memory and as a finished run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fluxflow_train import weights
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import RectifiedFlow

MODELS = "fluxflow_train.models"
VAE: dict[str, Any] = {
    "_target_": f"{MODELS}.vae.VAE",
    "encoder": {
        "_target_": f"{MODELS}.vae.Encoder",
        "latent_channels": 4,
        "widths": [8, 8],
        "down_kernel": 4,
        "head_depth": 1,
        "activation": "bezier",
        "heads": "bezier",
        "norm_groups": 8,
    },
    "decoder": {
        "_target_": f"{MODELS}.vae.Decoder",
        "latent_channels": 4,
        "widths": [8, 8],
        "up_kernel": 4,
        "dilated_kernel": 3,
        "context_channels": 5,
        "context_width": 16,
        "context_depth": 1,
        "context_heads": 2,
        "spade_hidden": 8,
        "head_widths": [8],
        "activation": "bezier",
        "spade_activation": "relu",
        "heads": "bezier",
        "norm_groups": 8,
        "skip_scale": 0.1,
    },
}
ARCHITECTURE: dict[str, Any] = {
    "_target_": f"{MODELS}.text_to_image.TextToImage",
    "vae": VAE,
    "text": {
        "_target_": f"{MODELS}.text.TextEncoder",
        "width": 24,
        "hidden": 16,
        "activation": "bezier",
        "backbone": {
            "_target_": f"{MODELS}.text_scratch.ScratchBackbone",
            "width": 16,
            "num_layers": 1,
            "num_heads": 2,
            "hidden": 16,
            "activation": "bezier",
        },
    },
    "flow": {
        "_target_": f"{MODELS}.flow.PillarTransformer",
        "latent_channels": 4,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "text_width": 24,
        "activation": "bezier",
        "mlp_width": 32,
        "pillar_layout": "planar",
        "text_tokens": "sequence",
        "residual": True,
    },
}


@pytest.fixture(scope="session")
def objective() -> RectifiedFlow:
    return RectifiedFlow(logit_normal_fraction=0.9, logit_normal_mean=0.0, logit_normal_std=1.0, shift=1.0)


@pytest.fixture(scope="session")
def model() -> TextToImage:
    """On the CPU; layers that start at zero are random, so that text, time and noise all matter."""
    torch.manual_seed(0)
    built: TextToImage = weights.build(ARCHITECTURE)
    for parameter in built.flow.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def write_run(folder: Path, model: nn.Module, architecture: dict[str, Any], **description: Any) -> Path:
    weights.save_model(folder, model, OmegaConf.create(architecture), description)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model: TextToImage, objective: RectifiedFlow) -> Path:
    """A finished run of `model` at 16 pixels."""
    return write_run(
        tmp_path_factory.mktemp("run"),
        model,
        ARCHITECTURE,
        objective={"_target_": "fluxflow_train.objectives.RectifiedFlow", **dataclasses.asdict(objective)},
        sampler={"solver": "euler", "steps": 3, "guidance": 3.0, "micro_batch": 4, "resolution": 16},
        cfg_dropout_prob=0.1,
    )


@pytest.fixture(scope="session")
def run_without_dropout(tmp_path_factory: pytest.TempPathFactory, model: TextToImage, run: Path) -> Path:
    description = weights.read_description(run) | {"cfg_dropout_prob": 0.0}
    del description["architecture"]
    return write_run(tmp_path_factory.mktemp("run"), model, ARCHITECTURE, **description)


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory, model: TextToImage) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), model.vae, VAE, objective=None)
