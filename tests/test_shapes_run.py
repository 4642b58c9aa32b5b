"""Training in several shapes, on a mixture of the user's own tars, for both tasks: as a person meets it."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxflow_train.errors import UserError
from fluxflow_train.tasks.budget import BudgetTask

Command = Callable[..., Any]
REPLACED = ("data", "evaluate.split", "budget.images", "scale.samples_every")
SIDES = [(64, 64), (64, 32), (32, 64), (32, 32)]  # width, height


def write(path: Path, first: int, count: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            width, height = SIDES[number % len(SIDES)]
            pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            captions = json.dumps({"alt": {"texts": [f"a red circle {number}", "a blue square"]}}).encode()
            for extension, data in (("png", buffer.getvalue()), ("json", captions)):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """Options with another data set: two sets of tars, several sizes and shapes, several captions."""
    folder = tmp_path_factory.mktemp("tars")
    photos, art = write(folder / "photos.tar", 0, 24), write(folder / "art.tar", 100, 8)
    val = write(folder / "val.tar", 200, 4)
    added = (
        "data=mix",
        f"data.mix={{photos: {{train: {photos}, weight: 3}}, art: {{train: {art}, weight: 1}}}}",
        f"data.val={val}",
        "data.resolutions=[32,64]",
        "data.bucket_aspect=2",
        "data.bucket_step=16",
        "data.caption_fields=[alt.texts]",
        f"data.root={folder}",
        "budget.images=16",
        "scale.samples_every=99",
        "evaluate.split=null",
    )

    def options(others: tuple[str, ...]) -> tuple[str, ...]:
        return (*(option for option in others if not option.startswith(REPLACED)), *added)

    return options


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


record_training = BudgetTask.record_training


def stop_at_the_end(task: BudgetTask, lr: float) -> None:
    record_training(task, lr)
    if task.images_seen == 16:
        raise UserError("stopped by the test")


@pytest.mark.parametrize("task", ["vae", "flow"])
def test_trains_in_several_shapes_and_resumes(
    task: str,
    mixed: Callable[..., tuple[str, ...]],
    small: tuple[str, ...],
    flow_options: tuple[str, ...],
    frozen_text: tuple[str, ...],
    tmp_path: Path,
    command: Command,
) -> None:
    own = mixed((*flow_options, *frozen_text)) if task == "flow" else (*mixed(small), "data.crop=random")
    options = (f"+experiment={task}_bezier", *own)
    whole = command("fluxflow_train", *options, f"run={tmp_path / 'whole'}")
    assert whole.code == 0, whole.output
    assert "Aspect-ratio buckets" in whole.output
    assert "Mixture" in whole.output
    assert int(rows(tmp_path / "whole")[-1]["images_seen"]) == 16

    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BudgetTask, "record_training", stop_at_the_end)
        assert command("fluxflow_train", *options, f"run={parts}").code == 1
    resumed = command("fluxflow_train", f"run={parts}")
    assert resumed.code == 0, resumed.output
    assert "resuming at 8 images" in resumed.output
    assert all(torch.equal(weights(parts)[name], tensor) for name, tensor in weights(tmp_path / "whole").items())
