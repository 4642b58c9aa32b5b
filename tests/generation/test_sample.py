"""The command, as typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxflow_train import Pipeline, weights
from fluxflow_train.errors import UserError
from fluxflow_train.generation import Request
from fluxflow_train.pictures import grid, near_square, png, shared
from fluxflow_train.pipeline import read_prompts

Sample = Callable[..., Any]


@pytest.fixture
def sample(command: Callable[..., Any], run: Path, tmp_path: Path) -> Sample:
    """`sample("prompts=[...]", ...)` into tmp_path/out, on the CPU."""
    return lambda *arguments, run=run: command(
        "fluxflow_train.sample", f"run={run}", f"out={tmp_path / 'out'}", "device=cpu", *arguments
    )


def test_pictures_grid_and_metadata(sample: Sample, run: Path, tmp_path: Path) -> None:
    result = sample(
        'prompts=["a red heart","a star, blue"]',
        "guidance=5",
        "steps=4",
        "negative=ugly",
        "num_images=3",
        "seed=2",
        "height=24",
        "width=16",
        "solver=heun",
        "guidance_interval=[0.1,0.9]",
        "guidance_rescale=0.5",
    )
    out = tmp_path / "out"
    assert result.code == 0 and "6 pictures" in result.output and result.output.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == [*(f"{i:04d}.png" for i in range(6)), "grid.png"]
    picture: Any = Image.open(out / "0004.png")
    assert picture.size == (16, 24)
    assert picture.text == {
        "prompt": "a star, blue",
        "negative_prompt": "ugly",
        "index": "1",
        "seed": "2",
        "solver": "heun",
        "steps": "4",
        "guidance": "5",
        "guidance_interval": "0.1 0.9",
        "guidance_rescale": "0.5",
        "size": "16x24",
        "weights": weights.read_description(run)["sha256"],
    }
    sheet = Image.open(out / "grid.png")
    assert sheet.width > sheet.height * 0.6  # three columns of tall pictures, two rows


def test_one_and_seven_images_are_the_same_bytes(sample: Sample, tmp_path: Path) -> None:
    assert sample("prompts=[a star]", f"out={tmp_path / 'one'}").code == 0
    assert sample("prompts=[a heart,a star]", "num_images=7", f"out={tmp_path / 'many'}").code == 0
    assert (tmp_path / "one" / "0000.png").read_bytes() == (tmp_path / "many" / "0007.png").read_bytes()
    assert (tmp_path / "one" / "0000.png").read_bytes() != (tmp_path / "many" / "0000.png").read_bytes()


def test_the_picture_of_validation_is_the_same_bytes(sample: Sample, run: Path, tmp_path: Path) -> None:
    """What `callbacks/prompts.py` writes from a model in training."""
    prompts = ["a red heart", "a star", "a bird"]
    pipeline = Pipeline.from_run(run, device="cpu")
    pipeline.model.flow.train()
    settings = pipeline.settings(seed=0)
    images = pipeline.generate([Request(prompt, "", 0) for prompt in prompts], settings)
    drawn = png(grid(images, prompts, near_square(3)), shared(settings, weights=None))
    assert sample("prompts=[a red heart,a star,a bird]").code == 0
    assert (tmp_path / "out" / "grid.png").read_bytes() == drawn
    assert sample("prompts=[a star]", f"out={tmp_path / 'one'}").code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / "0000.png")), images[1].permute(1, 2, 0).numpy())


def test_folders_of_pictures_are_made_in_the_run(command: Callable[..., Any], run: Path) -> None:
    assert command("fluxflow_train.sample", f"run={run}", "prompts=[a star]", "device=cpu").code == 0
    (folder,) = (run / "sampled").iterdir()
    assert {path.name for path in folder.iterdir()} == {"0000.png", "grid.png"}


def test_prompts_from_a_file(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red heart\r\n\r\n  ein Stern, blau  \n❤️\n".encode())
    assert read_prompts(str(file)) == ["a red heart", "ein Stern, blau", "❤️"]
    assert sample(f"prompts={file}").code == 0
    names = [Image.open(tmp_path / "out" / f"{i:04d}.png").text["prompt"] for i in range(3)]  # type: ignore[attr-defined]
    assert names == ["a red heart", "ein Stern, blau", "❤️"]


def test_prompts_as_typed(tmp_path: Path) -> None:
    assert read_prompts("a red heart") == ["a red heart"]
    assert read_prompts(["a", 3, ""]) == ["a", "3", ""]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Gr\xfcn".encode("latin-1"))
    for given, message in (
        ([], "there are no prompts"),
        (None, "there are no prompts"),
        (str(tmp_path / "empty.txt"), "there are no prompts"),
        (str(tmp_path / "none.txt"), "No such file"),
        (str(tmp_path / "latin.txt"), "it is not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(given)


@pytest.mark.parametrize("prompts", ['[""]', "['❤️🔥']", "['红心, сердце']"], ids=["empty", "emoji", "foreign"])
def test_unusual_prompts_are_drawn(sample: Sample, prompts: str) -> None:
    result = sample(f"prompts={prompts}")
    assert result.code == 0 and "note:" not in result.output


def test_a_long_prompt_is_cut_with_a_note(sample: Sample) -> None:
    result = sample(f"prompts=[{'heart ' * 1666}end.]")
    assert result.code == 0
    assert result.output.startswith('note: the prompt "heart heart') and "(10,000 characters)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts=[]"], "error: there are no prompts: give 'prompts=[\"a red heart\"]'"),
        (["prompts=nothing.txt"], "error: prompts=nothing.txt can't be read (No such file or directory)"),
        ([], "error: Missing mandatory value: prompts"),
        (["prompts=[a]", "height=18"], "error: height=18 width=16 can't be drawn: both must be multiples of 4"),
        (["prompts=[a]", "height=tall"], "error: height=tall must be a whole number"),
        (["prompts=[a]", "steps=2.5"], "error: steps=2.5 must be a whole number"),
        (["prompts=[a]", "seed=null"], "error: seed=None must be a whole number"),
        (["prompts=[a]", "guidance=much"], "error: guidance=much must be a number"),
        (["prompts=[a]", "guidance_interval=1"], "error: guidance_interval=1 must be two times"),
        (["prompts=[a]", "guidance_interval=[1]"], "error: guidance_interval=[1] must be two times"),
        (["prompts=[a]", "guidance=1", "negative=b"], "error: a negative prompt has no effect with guidance=1"),
        (["prompts=[a]", "num_images=0"], "error: 1 prompts of 0 images are nothing to draw"),
        (["prompts=[a]", "solver=ddim"], "error: solver=ddim is none of ours: give one of euler, heun, dpmpp_2m"),
        (["prompts=[a]", "guidence=5"], "Did you mean guidance"),
    ],
)
def test_mistakes_are_one_line(sample: Sample, arguments: list[str], message: str) -> None:
    result = sample(*arguments)
    assert result.code != 0 and message in result.output and result.output.count("\n") == 1


def test_a_file_where_pictures_should_go_is_one_line(run: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        done = command("fluxflow_train.sample", f"run={run}", "prompts=[a]", f"out={out}", "device=cpu")
        assert done.code == 1 and done.output.count("\n") == 1 and "name a folder" in done.output
    assert file.read_text() == "mine"


def test_runs_that_cannot_draw_are_one_line(
    sample: Sample, vae_run: Path, run_without_dropout: Path, tmp_path: Path
) -> None:
    for folder, message in (
        (vae_run, f"error: {vae_run} is no text-to-image run (VAE)"),
        (tmp_path, "model.json is missing: the run has not finished"),
        (run_without_dropout, "error: guidance=3 needs a model that also learned to draw without a caption"),
    ):
        result = sample("prompts=[a]", run=folder)
        assert result.code == 1 and message in result.output and result.output.count("\n") == 1
