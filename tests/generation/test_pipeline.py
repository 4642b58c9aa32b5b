import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxflow_train import Pipeline
from fluxflow_train.errors import UserError
from fluxflow_train.generation import Request, generate, render
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import RectifiedFlow
from fluxflow_train.pipeline import requests_of


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def pipeline(run: Path) -> Pipeline:
    return Pipeline.from_run(run, device="cpu")


def test_pictures_are_those_of_the_model_that_was_saved(
    pipeline: Pipeline, model: TextToImage, objective: RectifiedFlow
) -> None:
    images = pipeline(["a red heart", "a star"], num_images_per_prompt=2, seed=5).images
    assert [image.size for image in images] == [(16, 16)] * 4
    requests = [Request(prompt, "", index) for prompt in ("a red heart", "a star") for index in (0, 1)]
    expected = generate(model, objective, requests, pipeline.settings(seed=5))
    assert np.array_equal(pixels(images), expected.permute(0, 2, 3, 1).numpy())


def test_arguments_reach_the_sampler(pipeline: Pipeline) -> None:
    settings = pipeline.settings(seed=0)
    assert (settings.solver, settings.steps, settings.guidance.scale, settings.height) == ("euler", 3, 3.0, 16)
    plain = pipeline("a red heart").images[0]
    assert np.array_equal(pixels(pipeline("a red heart", seed=0).images)[0], np.asarray(plain))
    others = [
        pipeline("a red heart", **change).images[0]
        for change in (
            {"negative_prompt": "a star"},
            {"num_inference_steps": 4},
            {"guidance_scale": 1.0},
            {"seed": 1},
            {"solver": "unipc"},
        )
    ]
    assert len({image.tobytes() for image in [plain, *others]}) == 6
    assert pipeline("a red heart", height=8, width=20).images[0].size == (20, 8)


def test_noise_comes_from_a_given_generator(pipeline: Pipeline, model: TextToImage, objective: RectifiedFlow) -> None:
    images = pipeline("a star", num_images_per_prompt=2, generator=torch.Generator().manual_seed(11)).images
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(11))
    requests = [Request("a star", "", 0), Request("a star", "", 1)]
    expected = render(model, objective, requests, noise, pipeline.settings(seed=0))
    assert np.array_equal(pixels(images), expected.permute(0, 2, 3, 1).numpy())
    generator = torch.Generator().manual_seed(11)
    first, second = (pipeline("a star", generator=generator).images[0] for _ in range(2))
    assert first.tobytes() != second.tobytes()


def test_prompts_and_negative_prompts_are_paired() -> None:
    assert requests_of("a", None, 2) == [Request("a", "", 0), Request("a", "", 1)]
    assert requests_of(["a", "b"], "c", 1) == [Request("a", "c", 0), Request("b", "c", 0)]
    assert requests_of(["a", "b"], ["c", ""], 1) == [Request("a", "c", 0), Request("b", "", 0)]
    with pytest.raises(UserError, match="0 prompts of 1 images are nothing"):
        requests_of([], None, 1)
    with pytest.raises(UserError, match="1 prompts of 0 images are nothing"):
        requests_of("a", None, 0)
    with pytest.raises(UserError, match="3 negative prompts for 2 prompts"):
        requests_of(["a", "b"], ["c"] * 3, 1)


def test_what_a_model_cannot_do_is_refused(pipeline: Pipeline, run_without_dropout: Path) -> None:
    with pytest.raises(UserError, match="a negative prompt has no effect with guidance=1"):
        pipeline("a star", "a heart", guidance_scale=1.0)
    with pytest.raises(UserError, match="multiples of 4"):
        pipeline("a star", height=17)
    unconditional = Pipeline.from_run(run_without_dropout, device="cpu")
    with pytest.raises(UserError, match="guidance=3 needs a model that also learned to draw without a caption"):
        unconditional("a star")
    with pytest.raises(UserError, match="an empty prompt needs"):
        unconditional("", guidance_scale=1.0, generator=torch.Generator())
    assert len(unconditional("a star", guidance_scale=1.0).images) == 1


def test_other_folders_are_refused(tmp_path: Path, vae_run: Path) -> None:
    with pytest.raises(UserError, match=r"is no text-to-image run \(VAE\)"):
        Pipeline.from_run(vae_run)
    with pytest.raises(UserError, match=r"model\.json is missing"):
        Pipeline.from_run(tmp_path)
    with pytest.raises(UserError, match="device=warp is not to be had"):
        Pipeline.from_run(tmp_path, device="warp")


def test_the_package_imports_torch_only_when_asked() -> None:
    code = (
        "import sys, fluxflow_train; assert 'torch' not in sys.modules; fluxflow_train.Pipeline; sys.modules['torch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError, match="cannot import name 'Pipelines'"):
        from fluxflow_train import Pipelines  # type: ignore[attr-defined]  # noqa: F401
