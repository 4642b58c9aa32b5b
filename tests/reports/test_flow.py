import base64
import copy
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from fluxflow_train import weights
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.errors import UserError
from fluxflow_train.metrics import features
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import RectifiedFlow
from fluxflow_train.pictures import png, to_pil
from fluxflow_train.reports import flow_results
from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.drawing import SCALES
from fluxflow_train.reports.flow import evaluate_flow
from fluxflow_train.reports.flow_figures import training_samples
from fluxflow_train.reports.page import number, render
from fluxflow_train.reports.real_images import by_pixels, distances, read_split_images, read_train_images

OBJECTIVE = RectifiedFlow(logit_normal_fraction=0.9, logit_normal_mean=0.0, logit_normal_std=1.0, shift=1.0)
HOSTILE = """<script>alert('x')</script>"><img src=x onerror=alert(1)>"""
NUM_TEST = 12
needs_extractor = pytest.mark.skipif(not features.available(), reason="needs the demo extra")


def sampling(cfg_dropout_prob: float) -> dict[str, Any]:
    return {
        "objective": {"_target_": "fluxflow_train.objectives.RectifiedFlow", **dataclasses.asdict(OBJECTIVE)},
        "sampler": {"solver": "euler", "steps": 2, "guidance": 3.0, "micro_batch": 4, "resolution": 32},
        "cfg_dropout_prob": cfg_dropout_prob,
    }


def provenance(cfg_dropout_prob: float = 0.1) -> dict[str, Any]:
    return {
        "command": "python -m fluxflow_train +experiment=flow_bezier 'seed=1 & <b>'",
        "model": {"experiment": "flow_bezier", "images_seen": 64},
        "sampling": sampling(cfg_dropout_prob),
    }


def small_model() -> TextToImage:
    """Random weights; the layers that start at zero are random too, so that text and noise matter."""
    models = "fluxflow_train.models"
    encoder = {"latent_channels": 4, "widths": [8, 8], "down_kernel": 4, "head_depth": 1, "activation": "bezier"}
    decoder = {"latent_channels": 4, "widths": [8, 8], "up_kernel": 4, "dilated_kernel": 3, "context_channels": 5}
    decoder |= {"context_width": 16, "context_depth": 1, "context_heads": 2, "spade_hidden": 8, "head_widths": [8]}
    decoder |= {"activation": "bezier", "spade_activation": "relu", "heads": "bezier", "norm_groups": 8}
    backbone = {"width": 16, "num_layers": 1, "num_heads": 2, "hidden": 16, "activation": "bezier"}
    flow = {"latent_channels": 4, "width": 32, "depth": 1, "num_heads": 2, "text_width": 24, "activation": "bezier"}
    flow |= {"mlp_width": 32, "pillar_layout": "planar", "text_tokens": "sequence", "residual": True}
    torch.manual_seed(0)
    model: TextToImage = weights.build(
        {
            "_target_": f"{models}.text_to_image.TextToImage",
            "vae": {
                "_target_": f"{models}.vae.VAE",
                "encoder": {"_target_": f"{models}.vae.Encoder", **encoder, "heads": "bezier", "norm_groups": 8},
                "decoder": {"_target_": f"{models}.vae.Decoder", **decoder, "skip_scale": 0.1},
            },
            "text": {
                "_target_": f"{models}.text.TextEncoder",
                "width": 24,
                "hidden": 16,
                "activation": "bezier",
                "backbone": {"_target_": f"{models}.text_scratch.ScratchBackbone", **backbone},
            },
            "flow": {"_target_": f"{models}.flow.PillarTransformer", **flow},
        }
    )
    for parameter in model.flow.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def model() -> TextToImage:
    return small_model()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """48 training, 12 tune and 12 test images of 32 pixels."""
    from hydra import compose, initialize_config_dir

    from fluxflow_train.cli import config_folder

    root = tmp_path_factory.mktemp("data")
    sizes = ["data.num_train=48", "data.num_tune=12", f"data.num_test={NUM_TEST}", "scale.resolution=32"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg: DictConfig = compose("train", ["+experiment=vae_bezier", "data=shapes", *sizes, f"data.root={root}"])
    data: ImageData = instantiate(cfg.data.module)
    data.prepare_data()
    return data


def write_run(folder: Path) -> Path:
    """What training leaves beside the model."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["images_seen", "train/loss", "val/loss", *(f"val/loss_t{i}" for i in range(4))])
        table.writerow([32, 1.5, 1.25, 1.1, 1.2, 1.3, 1.4])
        table.writerow([64, 1.0, 0.75, 0.6, 0.7, 0.8, 0.9])
    (folder / "samples").mkdir()
    for i in range(11):
        (folder / "samples" / f"images_{16 * i:09d}.png").write_bytes(
            png(to_pil(torch.full((3, 8, 8), i, dtype=torch.uint8)), {})
        )
    return folder


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def evaluate_small(shapes: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    def run(
        model: TextToImage, data: Any = shapes, cfg_dropout_prob: float = 0.1, scales: tuple[float, ...] = ()
    ) -> dict[str, Any]:
        folder = write_run(tmp_path_factory.mktemp("run"))
        words = provenance(cfg_dropout_prob)
        return evaluate_flow(model, data, folder, device="cpu", seed=0, provenance=words, guidance_scales=scales)

    return run


@pytest.fixture(scope="session")
def whole(evaluate_small: Evaluate) -> dict[str, Any]:
    """With the extractor where it is installed. Not to be changed: copy it first."""
    return evaluate_small(small_model(), scales=(1, 3.0) if features.available() else ())


class Captioned:
    """The same data, with other captions."""

    def __init__(self, data: ImageData, caption: Callable[[int], str]):
        self.data, self.caption = data, caption

    def num_samples(self, split: Any) -> int:
        return self.data.num_samples(split)

    def eval_dataloader(self, split: Any) -> Any:
        for batch in self.data.eval_dataloader(split):
            yield batch | {"caption": [self.caption(i) for i in batch["index"].tolist()]}


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in report["results"]}


def test_counts_and_schema(whole: dict[str, Any]) -> None:
    figures = whole["figures"]
    assert whole["schema"] == "fid_report/v1" and whole["kind"] == "text-to-image"
    assert {whole["samples"][key] for key in ("expected", "drawn", "unique")} == {NUM_TEST}
    assert len(figures["captioned"]) == NUM_TEST
    assert figures["scales"] == list(SCALES)
    assert [len(row["images"]) for row in figures["by_scale"]] == [6] * 8
    assert [len(row["images"]) for row in figures["by_noise"]] == [4] * 6
    assert [len(item["nearest"]) for item in figures["neighbours"]] == [3] * 8
    assert [sheet["images_seen"] for sheet in figures["training_samples"]][::7] == [0, 160]
    assert len(figures["training_samples"]) == 8
    json.dumps(whole, allow_nan=False)


def test_the_loss_is_the_last_validation(whole: dict[str, Any]) -> None:
    results = by_name(whole)
    assert results["loss"]["value"] == 0.75 and results["loss_t3"]["value"] == 0.9
    assert "measured after" not in results["loss"]["note"]
    assert results["loss_zero"]["value"] > 0


def test_parameters_are_those_of_the_parts(whole: dict[str, Any], model: TextToImage) -> None:
    for name, part in model.named_children():
        assert by_name(whole)[f"parameters_{name}"]["value"] == sum(p.numel() for p in part.parameters())


@needs_extractor
def test_kernel_distances_stand_beside_their_floor_and_ceiling(whole: dict[str, Any]) -> None:
    results = by_name(whole)
    for name in ("kid", "kid_reconstruction", "kid_noise", "kid_noise_floor"):
        assert results[name]["n_real"] == results[name]["n_fake"] == NUM_TEST
        assert results[name]["interval"][0] <= results[name]["interval"][1]
    assert results["kid_train"]["n_real"] == 48
    low, high = results["kid_noise_floor"]["interval"]
    assert low < 0 < high < results["kid_noise"]["value"]
    assert not any(name.startswith("frechet") for name in results)
    assert any("no Frechet distance" in w for w in whole["warnings"])
    assert all(c["passed"] for c in whole["checks"])
    assert whole["status"] == "partial" and "only 12 images" in whole["status_reasons"][0]


@needs_extractor
def test_other_guidance_scales_are_measured_as_if_each_were_the_own(whole: dict[str, Any]) -> None:
    assert [part["guidance"] for part in whole["sweep"]] == [1, 3]
    low, own = ({entry["name"]: entry["raw"] for entry in part["results"]} for part in whole["sweep"])
    assert low.keys() == own.keys() == {"kid", "kid_train"}
    for name, value in own.items():
        assert value == by_name(whole)[name]["raw"] != low[name]
    assert number(low["kid"]) in render(whole)


def test_scales_that_are_none(evaluate_small: Evaluate, model: TextToImage) -> None:
    with pytest.raises(UserError, match="cfg_dropout_prob above 0"):
        evaluate_small(model, cfg_dropout_prob=0.0, scales=(1, 2))
    with pytest.raises(UserError, match="must be numbers"):
        evaluate_small(model, scales=("high",))


def test_kernel_distance_of_unequal_sets_is_that_of_the_definition() -> None:
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(9, 3)), draws.normal(0.5, 1, size=(5, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    own = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    other = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    cross = np.mean([k(a, b) for a in x for b in y])
    entry = flow_results.kid_to_train("n", torch.tensor(x), torch.tensor(y), 0, label="l")
    assert entry["raw"] == pytest.approx(own + other - 2 * cross)
    assert (entry["n_real"], entry["n_fake"]) == (9, 5)


def test_caption_and_noise_effects_are_told_apart() -> None:
    caption, noise = torch.tensor([0, 10, 40]), torch.tensor([0, 3])
    images = (caption[:, None] + noise).byte()[:, :, None, None, None].expand(3, 2, 3, 4, 4)
    effect, other = flow_results.caption_results(images)
    assert effect["value"] == pytest.approx((10 + 30 + 40) / 3, rel=1e-5)
    assert other["value"] == 3 and other["baseline_of"] == effect["name"]
    assert flow_results.caption_results(images[:1])[0]["value"] is None


def test_neighbours_are_the_nearest_of_all(shapes: ImageData) -> None:
    train = torch.cat([batch["image"] for batch in shapes.eval_dataloader("train")])
    queries = by_pixels(train[[5, 17]])
    found = read_train_images(shapes, 3, by_pixels, queries, lambda n: None)
    expected = distances(queries, by_pixels(train)).sort(1).values[:, :3]
    assert [[n.distance for n in row] for row in found.nearest] == expected.tolist()
    assert [row[0].distance for row in found.nearest] == [0, 0]
    assert torch.equal(found.nearest[1][0].image, train[17])
    assert found.features.shape[0] == len(train)


def test_distance_by_pixels_is_in_grey_levels() -> None:
    images = torch.stack([torch.full((3, 64, 64), v, dtype=torch.uint8) for v in (10, 17)])
    assert distances(by_pixels(images[:1]), by_pixels(images[1:])).item() == pytest.approx(7, rel=1e-5)


def test_a_nan_is_noticed(
    model: TextToImage, evaluate_small: Evaluate, shapes: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "available", lambda: False)
    nn.init.constant_(model.vae.decoder.rgb_conv.bias, math.nan)  # type: ignore[union-attr]
    report = evaluate_small(model)
    assert report["status"] == "smoke"
    assert any("finite outputs" in reason for reason in report["status_reasons"])
    assert "smoke" in render(report)


def test_without_dropped_captions_there_is_no_guidance(
    model: TextToImage, evaluate_small: Evaluate, shapes: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "available", lambda: False)
    report = evaluate_small(
        model, Captioned(shapes, lambda i: "" if i % 3 == 0 else f"a {HOSTILE} {i}"), cfg_dropout_prob=0.0
    )
    assert report["figures"]["scales"] == [1.0] and report["protocol"]["guidance"][0] == 1
    assert report["samples"]["expected"] == report["samples"]["drawn"] == 8
    assert any("4 images without a caption" in w for w in report["warnings"])
    assert not any(r["name"].startswith("kid") for r in report["results"])
    assert report["figures"]["neighbour_unit"] == "grey levels"
    page = render(report)
    assert "cfg_dropout_prob = 0" in page and "pip install" in page
    assert "<script>alert" not in page and "<img src=x" not in page


def test_no_captions_at_all(shapes: ImageData) -> None:
    silent = Captioned(shapes, lambda i: " ")
    with pytest.raises(UserError, match="no captions"):
        read_split_images(silent, "test", captionless=False)
    assert len(read_split_images(silent, "test", captionless=True).images) == NUM_TEST


def test_the_page_comes_from_the_json_alone(whole: dict[str, Any], tmp_path: Path) -> None:
    write_report(whole, tmp_path)
    page = render(json.loads((tmp_path / "report.json").read_text()))
    assert page == (tmp_path / "report.html").read_text()
    for result in whole["results"]:
        if result["baseline_of"] or result["name"] in ("loss", "kid", "caption_effect", "seconds_per_image"):
            assert number(result["value"], result["unit"]) in page, result["name"]
    for title in ("Guidance", "Attention to captions", "Nearest training images", "Samples over training", "Training"):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", page)


def test_every_text_is_escaped(whole: dict[str, Any]) -> None:
    hostile = copy.deepcopy(whole)

    def spoil(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: spoil(value) for key, value in node.items()}
        if isinstance(node, list):
            return [spoil(value) for value in node]
        return node + HOSTILE if isinstance(node, str) else node

    for part in ("model", "reference", "samples", "warnings", "checks", "environment"):
        hostile[part] = spoil(hostile[part])
    for key in ("captioned", "by_scale", "by_noise", "neighbours"):
        for item in hostile["figures"][key]:
            item.update({name: HOSTILE for name in ("caption", "prompt") if name in item})
            for near in item.get("nearest", []):
                near["key"] = HOSTILE
    page = render(hostile)
    assert "alert(" in page and "<script>alert" not in page and "<img src=x" not in page


def test_samples_over_training_are_evenly_spaced(tmp_path: Path) -> None:
    assert training_samples(tmp_path) == []
    sheets = training_samples(write_run(tmp_path) / "samples")
    assert [sheet["images_seen"] // 16 for sheet in sheets] == [0, 1, 3, 4, 6, 7, 9, 10]
    image = Image.open(io.BytesIO(base64.b64decode(sheets[2]["image"])))
    assert image.size == (8, 8) and image.getpixel((0, 0)) == (3, 3, 3)
