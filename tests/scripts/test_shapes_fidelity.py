"""Fidelity of shapes: known errors come out exactly, a null prompt that follows the prompts is found out."""

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from fluxflow_train import rng, weights
from fluxflow_train.data.sources.shapes import COLOURS, PLACES, nouns, paint
from fluxflow_train.metrics.shapes import NONE, Detection, detect
from fluxflow_train.models.text import TextFeatures
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import RectifiedFlow
from fluxflow_train.pipeline import Pipeline
from fluxflow_train.pixels import dequantize

SCRIPT = Path(__file__).parents[2] / "scripts" / "shapes_fidelity.py"
SIDE = 64
SAMPLER = {"solver": "euler", "steps": 2, "guidance": 3.0, "micro_batch": 4, "resolution": SIDE}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes_fidelity", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(colour: str, kind: str, x: float = 0.5, y: float = 0.5) -> Detection:
    return Detection(colour, kind, x, y, 0.2, 0.0)


def test_prompts_are_held_out_and_balanced(script) -> None:
    asked = script.prompts(200)
    assert {a.noun for a in asked} == set(nouns("test")) and not {a.noun for a in asked} & set(nouns("train"))
    assert set(Counter(a.noun[0] for a in asked).values()) == {25}
    assert set(Counter(a.place for a in asked).values()) == {22, 23}
    assert {a.noun for a in script.prompts(8)} == set(nouns("test"))
    assert len({(a.noun, a.place) for a in asked}) == 72
    assert script.Asked(("orange", "star"), ("top", "left")).prompt == "an orange star at the top left"
    assert script.Asked(("red", "star"), ("", "")).prompt == "a red star in the centre"


def test_drawings_with_known_errors_come_out_exactly(script) -> None:
    asked = script.prompts(40)
    images = [script.drawing(a, SIDE, rng.generator(0, "drawing test", n)) for n, a in enumerate(asked)]
    for number in range(4):  # another colour, the same kind and place
        wrong = script.Asked((next(c for c in COLOURS if c != asked[number].noun[0]), asked[number].noun[1]), PLACES[4])
        images[number] = script.drawing(wrong._replace(place=asked[number].place), SIDE, rng.generator(0, "w", number))
    for number in range(4, 14):  # another kind
        kind = "cross" if asked[number].noun[1] == "circle" else "circle"
        wrong = script.Asked((asked[number].noun[0], kind), asked[number].place)
        images[number] = script.drawing(wrong, SIDE, rng.generator(0, "w", number))
    for number in range(14, 16):  # nothing
        images[number] = np.full((3, SIDE, SIDE), 255, np.uint8)
    for number in range(16, 21):  # another place
        place = PLACES[(PLACES.index(asked[number].place) + 4) % 9]
        images[number] = script.drawing(asked[number]._replace(place=place), SIDE, rng.generator(0, "w", number))
    result = script.prompted(asked, [detect(image) for image in images])
    assert result["nothing"] == 2 / 40
    assert (result["colour"], result["shape"]) == (34 / 40, 28 / 40)
    assert (result["both"], result["place"]) == (24 / 40, 33 / 40)
    assert result["shape_interval"] == script.wilson(28, 40)


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.38, 0.62, ("bottom", "left")),
        (0.42, 0.58, ("", "")),
        (0.58, 0.42, ("", "")),
        (0.62, 0.38, ("top", "right")),
        (0.0, 0.5, ("", "left")),
        (1.0, 1.0, ("bottom", "right")),
    ],
)
def test_cells(script, x: float, y: float, place: tuple[str, str]) -> None:
    assert script.place_of(seen("red", "star", x, y)) == place


def test_nothing_is_nowhere(script) -> None:
    assert script.place_of(detect(np.full((3, SIDE, SIDE), 255, np.uint8))) is None


def test_a_null_that_copies_its_prompt_is_outside(script) -> None:
    asked = script.prompts(200)
    result = script.unprompted(asked, [seen(*a.noun) for a in asked])
    assert result["colour_null"] == result["shape_null"] == 1
    assert result["colour_chance"] == pytest.approx(1 / 8)
    assert not result["colour_null_inside"] and not result["shape_null_inside"]


def test_a_null_that_avoids_its_prompt_is_outside(script) -> None:
    asked = script.prompts(200)
    others = [seen(asked[(n + 1) % 200].noun[0], asked[n].noun[1]) for n in range(200)]
    result = script.unprompted(asked, others)
    assert result["colour_null"] == 0 and not result["colour_null_inside"]


def test_a_null_of_its_own_mind_is_inside(script) -> None:
    asked = script.prompts(200)
    draws = rng.generator(0, "null")
    own = [seen(["red", "blue", NONE][draws.integers(3)], "circle") for _ in asked]
    result = script.unprompted(asked, own)
    drawn, wanted = [f.colour for f in own], [a.noun[0] for a in asked]
    chance = np.mean([[colour == other for other in drawn] for colour in wanted])
    assert result["colour_chance"] == pytest.approx(chance)
    assert result["colour_null"] == np.mean([c == w for c, w in zip(drawn, wanted, strict=True)])
    assert result["shape_null"] == result["shape_chance"] == 50 / 200
    assert result["colour_null_inside"] and result["shape_null_inside"]


@pytest.mark.parametrize(("right", "num"), [(0, 10), (3, 10), (180, 200), (200, 200)])
def test_wilson_is_scipys(script, right: int, num: int) -> None:
    expected = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
    assert script.wilson(right, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("num", [1, 7, 200, 1500])
@pytest.mark.parametrize("p", [0.0, 1e-4, 0.125, 1 / 6, 0.5, 0.97, 1.0])
def test_binomial_interval_is_scipys(script, p: float, num: int) -> None:
    assert script.binomial_interval(p, num) == stats.binom.interval(0.99, num, p)


# ---- through the pipeline ----


class Oracle(nn.Module):
    """Text encoder, VAE and flow of a model that knows each prompt's drawing, and draws every star as a circle."""

    def __init__(self, drawings: dict[str, np.ndarray], without: np.ndarray) -> None:
        super().__init__()
        self.drawings, self.without = drawings, without
        self.stride, self.latent_channels = 1, 3
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, image: np.ndarray) -> TextFeatures:
        pooled = dequantize(torch.from_numpy(image.copy())[None]).flatten(1)
        return TextFeatures(torch.zeros(1, 1, pooled.shape[1]), torch.ones(1, 1, dtype=torch.bool), pooled)

    def encode(self, captions: list[str]) -> TextFeatures:
        return self.features(self.drawings[captions[0]])

    def null(self, batch_size: int, num_tokens: int) -> TextFeatures:
        assert (batch_size, num_tokens) == (1, 1)
        return self.features(self.without)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def decode(self, z: Tensor) -> Tensor:
        return z

    def forward(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """(z_t - x) / t: the velocity of the straight path that ends at the drawing x."""
        return (z - text.pooled.reshape_as(z)) / t[:, None, None, None]


def test_a_model_with_known_faults(script) -> None:
    drawings = {}
    for number, asked in enumerate(script.prompts(72)):
        colour, kind = asked.noun
        known = asked._replace(noun=(colour, "circle" if kind == "star" else kind))
        drawings[asked.prompt] = script.drawing(known, SIDE, rng.generator(0, "oracle", number))
    without = np.asarray(paint([(("red", "circle"), 0.5, 0.5, 0.2)], SIDE)).transpose(2, 0, 1)
    oracle = Oracle(drawings, without)
    pipeline = Pipeline(
        TextToImage(oracle, oracle, oracle), RectifiedFlow(0.9, 0, 1, 1), {"sampler": SAMPLER, "cfg_dropout_prob": 0.1}
    )
    options = argparse.Namespace(num_prompts=24, guidance=1.0, steps=2, seed=0)
    result, sheet = script.measure(pipeline, options)
    stars = sum(a.noun[1] == "star" for a in script.prompts(24)) / 24
    circles = sum(a.noun[1] == "circle" for a in script.prompts(24)) / 24
    assert 0 < stars < 1
    assert (result["colour"], result["place"], result["detector"]) == (1, 1, 1)
    assert result["shape"] == result["both"] == pytest.approx(1 - stars)
    assert result["colour_null"] == result["colour_chance"] == 1 / 8
    assert result["shape_null"] == result["shape_chance"] == circles
    assert result["colour_null_inside"] and result["shape_null_inside"]
    assert "shape" in script.table(result) and "OUTSIDE" not in script.table(result)
    frames = [sheet.getpixel((70 * (number % 8), 70 * (number // 8))) for number in range(24)]
    assert frames.count(script.RIGHT) == round(24 * (1 - stars)) and frames.count(script.WRONG) == round(24 * stars)


@pytest.fixture
def untrained(config: Callable[..., DictConfig], tmp_path: Path) -> Callable[[float], Path]:
    """`untrained(cfg_dropout_prob)`: the folder of a small model as training leaves it."""

    def build(cfg_dropout_prob: float) -> Path:
        vae = config("+experiment=vae_bezier").model
        package = "fluxflow_train.models"
        text = {
            "_target_": f"{package}.text.TextEncoder",
            "width": 8,
            "hidden": 8,
            "activation": "silu",
            "backbone": {
                "_target_": f"{package}.text_scratch.ScratchBackbone",
                "width": 8,
                "num_layers": 1,
                "num_heads": 1,
                "hidden": 8,
                "activation": "silu",
            },
        }
        flow = {
            "_target_": f"{package}.flow.PillarTransformer",
            "latent_channels": vae.decoder.latent_channels,
            "width": 8,
            "depth": 1,
            "num_heads": 1,
            "text_width": 8,
            "activation": "silu",
            "mlp_width": 8,
            "pillar_layout": "planar",
            "text_tokens": "sequence",
            "residual": True,
        }
        architecture = OmegaConf.create(
            {
                "_target_": f"{package}.text_to_image.TextToImage",
                "vae": OmegaConf.to_container(vae, resolve=True),
                "text": text,
                "flow": flow,
            }
        )
        objective = {"_target_": "fluxflow_train.objectives.RectifiedFlow", "logit_normal_fraction": 0.9}
        objective |= {"logit_normal_mean": 0.0, "logit_normal_std": 1.0, "shift": 1.0}
        torch.manual_seed(0)
        model: Any = weights.build(OmegaConf.to_container(architecture))
        folder = tmp_path / "run"
        weights.save_model(
            folder,
            model,
            architecture,
            {
                "objective": objective,
                "sampler": SAMPLER | {"resolution": 32},
                "cfg_dropout_prob": cfg_dropout_prob,
                "text_fingerprint": model.text.backbone.fingerprint,
            },
        )
        return folder

    return build


def test_a_run_from_the_command_line(script, untrained, tmp_path, capsys) -> None:
    arguments = [f"run={untrained(0.1)}", "--json", str(tmp_path / "f.json"), "--num-prompts", "5", "--steps", "2"]
    assert script.main(arguments) == 0
    result = json.loads((tmp_path / "f.json").read_text())
    wanted = "colour shape both colour_null shape_null colour_chance shape_chance colour_null_inside shape_null_inside"
    assert {*wanted.split(), "detector", "place", "num_prompts", "guidance", "steps", "seconds"} <= result.keys()
    assert (result["num_prompts"], result["guidance"], result["steps"]) == (5, 3.0, 2)
    assert result["detector"] == 1 and result["both"] == 0  # what nobody trained draws no shape
    with Image.open(tmp_path / "f.png") as sheet:
        assert sheet.size == (8 * 38, 8 * 38)
    first = capsys.readouterr()
    assert "95 % interval" in first.out and first.err == ""


def test_guidance_that_was_not_trained_is_one_line(script, untrained, tmp_path, capsys) -> None:
    assert script.main([f"run={untrained(0.0)}", "--json", str(tmp_path / "f.json")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "f.json").exists()


def test_no_run_is_one_line(script, tmp_path, capsys) -> None:
    assert script.main([f"run={tmp_path}", "--json", str(tmp_path / "f.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("wrong", [["somewhere"], ["run="], ["run=x", "--num-prompts", "0"]])
def test_wrong_arguments(script, wrong: list[str], tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([*wrong, "--json", str(tmp_path / "f.json")])
    assert "expected" in capsys.readouterr().err
