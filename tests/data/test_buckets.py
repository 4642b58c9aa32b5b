"""Shapes of training batches: which there are, which image takes which, and a resume in the middle of it all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fluxflow_train.data.buckets import BucketRule, Buckets, Shape
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.latent_data import LatentData
from fluxflow_train.data.sources.mixture import Mixture
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.errors import UserError
from fluxflow_train.models.vae import VAE

SIDES = [(32, 32), (64, 32), (32, 64), (48, 40), (20, 60), (33, 31), (16, 16)]  # width, height


@given(st.sampled_from([8, 16, 32]), st.integers(2, 16), st.floats(1, 4))
def test_shapes_keep_to_the_rule(step, multiple, aspect):
    resolution = step * multiple
    ((square, *_), *_) = rows = BucketRule((resolution,), aspect, step).shapes()
    assert len(rows) == 1
    assert (resolution, resolution) in rows[0]
    assert {(w, h) for h, w in rows[0]} == set(rows[0])  # upright and wide alike
    for height, width in rows[0]:
        assert height % step == width % step == 0
        assert max(height, width) <= aspect * min(height, width)
        longer = max(height, width)
        assert abs(min(height, width) - resolution**2 / longer) <= step / 2
    assert square


def by_rule(rule: BucketRule, sides: list[tuple[int, int]], batch_size: int = 1) -> Buckets:
    width, height = np.array(sides).T
    return Buckets.by_rule(rule, width, height, batch_size)


def test_each_image_takes_the_nearest_aspect():
    buckets = by_rule(BucketRule((32,), 2.0, 8, min_share=0), [(100, 100), (200, 100), (100, 190), (1000, 100)])
    assert [buckets.shape(sample) for sample in range(4)] == [(32, 32), (24, 40), (40, 24), (24, 40)]


def test_the_largest_resolution_that_is_filled():
    rule = BucketRule((32, 64, 128), 1.0, 32, min_share=0)
    buckets = by_rule(rule, [(20, 20), (32, 32), (63, 200), (64, 64), (500, 127), (128, 128)])
    assert [buckets.shape(sample).height for sample in range(6)] == [32, 32, 32, 64, 64, 128]


def test_rare_buckets_join_the_nearest():
    sides = [(100, 100)] * 90 + [(200, 100)] * 9 + [(170, 100)]
    rule = BucketRule((64,), 2.0, 8, min_share=0)
    assert sorted(by_rule(rule, sides).counts) == [1, 9, 90]
    assert by_rule(BucketRule((64,), 2.0, 8, min_share=0.05), sides).counts == [90, 10]
    assert by_rule(rule, sides, batch_size=5).counts == [90, 10]
    assert by_rule(rule, sides, batch_size=20).counts == [100]
    assert by_rule(rule, sides, batch_size=4000).shapes == (Shape(64, 64),)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((),), "resolutions: got"),
        (((32,), 0.5), "bucket_aspect: got 0.5"),
        (((32,), 2.0, 24), "bucket_step: got 24, expected a divisor of the resolution 32"),
        (((32,), 2.0, 64), "bucket_step: got 64, expected 1 to the resolution 32"),
        (((32,), 2.0, 16, 2.0), "bucket_share: got 2.0"),
    ],
)
def test_impossible_rules(arguments, text):
    with pytest.raises(ValueError, match=text):
        BucketRule(*arguments)


@pytest.fixture
def data(make_tar: Callable[..., Path], encoded: Callable[..., bytes], tmp_path: Path) -> Callable[..., ImageData]:
    """Two datasets of several shapes, several captions and two damaged images, mixed 1 to 2."""

    def shard(name: str, first: int, count: int) -> str:
        members = []
        for number in range(first, first + count):
            image = encoded(number, SIDES[number % len(SIDES)])
            damaged = number in (first + 3, first + 11)
            captions = {"captions": [f"{number} {word}" for word in "abc"]}
            members += [(f"{number:04d}.png", image[:-20] if damaged else image)]
            members += [(f"{number:04d}.json", json.dumps(captions).encode())]
        return str(make_tar(members, name))

    one, two, three = shard("one.tar", 0, 30), shard("two.tar", 100, 33), shard("three.tar", 200, 17)
    mix = {"a": {"train": one, "weight": 1}, "b": {"train": str(tmp_path / "t{wo,hree}.tar"), "weight": 2}}

    def make(**options: Any) -> ImageData:
        source = Mixture(mix, val=three)
        arguments: dict[str, Any] = {
            "source": source,
            "resolution": 32,
            "batch_size": 6,
            "budget_images": 240,
            "seed": 5,
            "flip_prob": 0.5,
            "crop": "random",
            "bucket_aspect": 2.0,
            "bucket_step": 8,
            "bucket_share": 0.1,
            "max_bad_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
        }
        made = ImageData(**arguments | options)
        made.prepare_data()
        return made

    assert three
    assert two
    return make


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = all(torch.equal(one[name], other[name]) for name in ("image", "index", "epoch"))
    return tensors and one["key"] == other["key"] and one["caption"] == other["caption"]


class TestTraining:
    def test_batches_are_of_one_shape_each(self, data):
        made = data()
        batches = list(made.train_dataloader())
        shapes = {tuple(batch["image"].shape[2:]) for batch in batches}
        assert shapes == set(made.buckets("train").shapes)
        assert len(shapes) >= 3
        seen = [key < "0100" for batch in batches for key in batch["key"]]
        assert abs(sum(seen) / len(seen) - 1 / 3) < 0.06
        words = {caption.split()[1] for batch in batches for caption in batch["caption"]}
        assert words == {"a", "b", "c"}

    def test_evaluation_stays_square(self, data):
        made = data()
        assert {tuple(batch["image"].shape[2:]) for batch in made.val_dataloader()} == {(32, 32)}

    def test_random_crops_differ_by_epoch_and_stay_inside(self, data):
        views: dict[int, set[bytes]] = {}
        for batch in data(flip_prob=0.0).train_dataloader():
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                views.setdefault(index, set()).add(image.numpy().tobytes())
        assert max(map(len, views.values())) > 2

    @pytest.mark.parametrize("workers", [0, 1, 3])
    @pytest.mark.parametrize("done", [0, 7, 23])
    def test_resume_gives_the_same_rest(self, data, workers, done):
        expected = list(data().train_dataloader())
        interrupted = data(num_workers=workers).train_dataloader()
        iterator = iter(interrupted)
        for _ in range(done):
            next(iterator)
        resumed = data(num_workers=workers).train_dataloader()
        resumed.load_state_dict(interrupted.state_dict())
        rest = list(resumed)
        assert len(rest) == 40 - done
        assert all(map(same, rest, expected[done:]))

    def test_resume_on_two_ranks(self, data, monkeypatch):
        expected = list(data().train_dataloader())
        interrupted = data().train_dataloader()
        iterator = iter(interrupted)
        for _ in range(9):
            next(iterator)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        parts = []
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            resumed = data().train_dataloader()
            resumed.load_state_dict(interrupted.state_dict())
            parts.append(list(resumed))
        for one, two, whole in zip(*parts, expected[9:], strict=True):
            assert torch.equal(torch.cat([one["image"], two["image"]]), whole["image"])
            assert one["caption"] + two["caption"] == whole["caption"]

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"bucket_aspect": 1.0, "resolutions": None}, "the shapes of the images"), ({"batch_size": 3}, "batch size")],
    )
    def test_resume_refuses_other_buckets(self, data, options, text):
        state = data().train_dataloader().state_dict()
        with pytest.raises(UserError, match=f"can't resume: .*{text}"):
            data(**options).train_dataloader().load_state_dict(state)

    def test_resume_refuses_another_mixture(self, data):
        loader = data().train_dataloader()
        state = loader.state_dict() | {"mix": [1, 2047]}
        with pytest.raises(UserError, match="can't resume: the mixture of the datasets"):
            loader.load_state_dict(state)

    def test_tables(self, data, capsys):
        data()
        shown = capsys.readouterr().err
        assert "Aspect-ratio buckets" in shown
        assert "33.3%" in shown


def pooled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.avg_pool2d(x, 4), F.avg_pool2d(x.square(), 4)


def test_latents_of_several_shapes(data, vae: VAE, tmp_path: Path):
    images = data(crop="center")
    with pytest.raises(ValueError, match="crop: got random"):
        LatentData(data(), vae, "ab" * 32, None, str(tmp_path), "cpu")
    latents = LatentData(images, vae, "ab" * 32, None, str(tmp_path), "cpu")
    latents.prepare_data()
    for batch, image in zip(latents.train_dataloader(), images.train_dataloader(), strict=True):
        assert batch["key"] == image["key"]
        height, width = image["image"].shape[2:]
        assert batch["latent_mean"].shape == (6, 4, height // 4, width // 4)
        with torch.no_grad():
            mean, _ = vae.posterior(image["image"] / 127.5 - 1)
        assert (batch["latent_mean"] - mean).abs().mean() < 0.2  # of dequantised and flipped images, up to noise
    assert {batch["latent_mean"].shape[2:] for batch in latents.val_dataloader()} == {(8, 8)}


@pytest.mark.parametrize(
    ("mix", "text"),
    [
        ({}, "mix: got nothing"),
        ({"a": {"train": "a.tar"}}, "mix.a: got"),
        ({"a": {"train": "a.tar", "weight": 0}}, "mix.a.weight: got 0"),
        ({"a": {"train": "a.tar", "weight": "much"}}, "mix.a.weight: got 'much'"),
        ({"a": {"train": "a.tar", "weight": 1}, "b": {"train": "b.tar", "weight": 1e-5}}, "below 1/2048"),
        ({"a": {"train": "a.tar", "weight": 1}, "b": {"train": "{b,a}.tar", "weight": 1}}, "is in a already"),
    ],
)
def test_impossible_mixtures(mix, text):
    with pytest.raises(ValueError, match=text):
        Mixture(mix, val="v.tar")


def test_a_dataset_without_a_usable_image(make_tar, pairs, tmp_path):
    good = str(make_tar(pairs(4), "good.tar"))
    bad = str(make_tar([("a.png", b"no image"), ("b.png", b"")], "bad.tar"))
    mix = {"good": {"train": good, "weight": 1}, "bad": {"train": bad, "weight": 1}}
    made = ImageData(Mixture(mix, good), 16, 2, 8, seed=0, max_bad_fraction=1.0, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"dataset bad of .* has no usable sample"):
        made.prepare_data()


def test_an_epoch_of_one_source_is_as_before(make_tar, pairs, tmp_path):
    path = str(make_tar(pairs(10)))
    made = ImageData(Shards(path, path), 16, 5, 20, seed=0, resolutions=[16], cache_dir=str(tmp_path))
    squares = ImageData(Shards(path, path), 16, 5, 20, seed=0, cache_dir=str(tmp_path))
    assert all(map(same, made.train_dataloader(), squares.train_dataloader()))
