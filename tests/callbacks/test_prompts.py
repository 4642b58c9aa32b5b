"""When the prompt grid is drawn, of which prompts, and with whose weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.callbacks.prompts import PromptGrid
from fluxflow_train.generation import settings_of
from fluxflow_train.models.text import TextEncoder
from fluxflow_train.models.text_scratch import ScratchBackbone
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.models.vae import VAE, Decoder, Encoder
from fluxflow_train.objectives import RectifiedFlow

SAMPLER = {"solver": "euler", "steps": 1, "guidance": 2.0, "micro_batch": 2, "resolution": 16}


class Constant(nn.Module):
    """A flow whose prediction is its one weight."""

    latent_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, z: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
        return self.value + 0 * z


def build_model() -> TextToImage:
    torch.manual_seed(0)
    vae = VAE(
        Encoder(4, [8, 8], 4, 0, "relu", "plain", 4),
        Decoder(4, [8, 8], 4, 3, 5, 16, 1, 2, 8, [8], "relu", "relu", "plain", 4, 1.0),
    )
    text = TextEncoder(ScratchBackbone(16, 1, 2, 16, "relu"), width=24, hidden=16, activation="relu")
    return TextToImage(vae, text, Constant())


class Data:
    """Captions of the tune split: one is missing and one is there twice."""

    seed = 3
    captions = ("a", "b", "", "a", "c", "d")

    def num_samples(self, split: str) -> int:
        assert split == "tune"
        return len(self.captions)

    def caption(self, split: str, sample: int) -> str:
        return self.captions[sample]


@pytest.fixture
def task() -> Any:
    model = build_model()
    objective = RectifiedFlow(0.9, 0.0, 1.0, 1.0)
    return SimpleNamespace(
        model=model,
        objective=objective,
        sampler=SAMPLER,
        seed=0,
        images_seen=0,
        ema_modules=lambda: {"flow": model.flow},
    )


def trainer_with(task: Any) -> Any:
    average = EMA(budget_images=100)
    trainer = SimpleNamespace(is_global_zero=True, datamodule=Data(), callbacks=[average])
    average.on_fit_start(trainer, task)  # type: ignore[arg-type]
    return trainer


def train(grid: PromptGrid, trainer: Any, task: Any, seen: list[int]) -> None:
    grid.on_fit_start(trainer, task)
    for task.images_seen in seen:
        grid.on_train_batch_end(trainer, task, None, None, 0)
    grid.on_train_end(trainer, task)


def test_drawn_every_so_many_images_and_at_the_end(task: Any, tmp_path: Path) -> None:
    train(PromptGrid(str(tmp_path), 10, 2, None), trainer_with(task), task, [4, 8, 12, 16, 20, 24])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "images_000000012.png",
        "images_000000020.png",
        "images_000000024.png",
    ]


def test_resumed_run_draws_what_is_left(task: Any, tmp_path: Path) -> None:
    grid = PromptGrid(str(tmp_path), 10, 2, None)
    grid.load_state_dict({"drawn_at": 12})
    train(grid, trainer_with(task), task, [16, 20])
    assert [path.name for path in tmp_path.iterdir()] == ["images_000000020.png"]
    assert grid.state_dict() == {"drawn_at": 20}


def test_prompts_are_captions_chosen_by_the_seed(task: Any, tmp_path: Path) -> None:
    grids = [PromptGrid(str(tmp_path), 10, number, None) for number in (3, 3, 16)]
    for grid in grids:
        grid.on_fit_start(trainer_with(task), task)
    assert grids[0].prompts == grids[1].prompts
    assert grids[2].prompts is not None
    assert grids[2].prompts[:3] == grids[0].prompts
    assert sorted(grids[2].prompts) == ["a", "b", "c", "d"]
    own = PromptGrid(str(tmp_path), 10, 3, ["x", ""])
    own.on_fit_start(trainer_with(task), task)
    assert own.prompts == ["x", ""]


def test_grid_shows_the_averaged_weights_and_says_how(task: Any, tmp_path: Path) -> None:
    trainer = trainer_with(task)
    train(PromptGrid(str(tmp_path / "zero"), 10, 2, ["x"]), trainer, task, [4])
    with torch.no_grad():
        task.model.flow.value.fill_(50)
    train(PromptGrid(str(tmp_path / "live"), 10, 2, ["x"]), trainer, task, [4])
    assert task.model.flow.value == 50
    trainer.callbacks[0].average["flow.value"].fill_(50)
    train(PromptGrid(str(tmp_path / "average"), 10, 2, ["x"]), trainer, task, [4])
    files = {path.parent.name: path for path in tmp_path.glob("*/images_000000004.png")}
    assert files["zero"].read_bytes() == files["live"].read_bytes()
    assert files["zero"].read_bytes() != files["average"].read_bytes()
    with Image.open(files["zero"]) as picture:
        assert picture.info["guidance"] == "2"
        assert picture.info["seed"] == "0"
        assert "weights" not in picture.info


def test_other_ranks_draw_nothing_and_keep_count(task: Any, tmp_path: Path) -> None:
    trainer = trainer_with(task)
    trainer.is_global_zero = False
    grid = PromptGrid(str(tmp_path), 10, 2, None)
    train(grid, trainer, task, [12])
    assert not list(tmp_path.iterdir())
    assert grid.state_dict() == {"drawn_at": 12}


def test_settings_are_the_tasks_own() -> None:
    settings = settings_of(SAMPLER, seed=4)
    assert (settings.solver, settings.steps, settings.micro_batch, settings.seed) == ("euler", 1, 2, 4)
    assert (settings.height, settings.width) == (16, 16)
    assert settings.guidance == (2.0, (0.0, 1.0), 0.0)
