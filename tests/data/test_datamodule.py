"""Loaders end to end: batches, exact resume (also through Lightning), evaluation over several processes, damage."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.sources.shapes import Shapes
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.errors import UserError

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    source = Shapes(str(tmp_path_factory.mktemp("shapes")), resolution=16, num_train=29, num_tune=11, num_test=10)
    source.prepare()
    return source


@pytest.fixture
def make(shapes: Shapes, tmp_path: Path) -> Callable[..., ImageData]:
    def data(**options: Any) -> ImageData:
        arguments: dict[str, Any] = {
            "source": shapes,
            "resolution": 16,
            "batch_size": 8,
            "budget_images": 76,  # 10 batches: two and three quarters of an epoch
            "seed": 3,
            "flip_prob": 0.5,
            "cache_dir": str(tmp_path / "cache"),
        }
        module = ImageData(**arguments | options)
        module.prepare_data()
        return module

    return data


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(one[name], other[name]) for name in ("image", "index", "epoch"))
    return tensors and one["key"] == other["key"] and one["caption"] == other["caption"]


class Recorder(LightningModule):
    """Keeps every batch that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []
        self.tuned: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.tuned += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class StopAt(Callback):
    """Writes a checkpoint after `step` steps and ends the run, as a preemption would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(data: ImageData, *callbacks: Callback, checkpoint: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


class TestTraining:
    def test_batches(self, make):
        loader = make().train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 10
        for batch in batches:
            assert batch["image"].shape == (8, 3, 16, 16)
            assert batch["image"].dtype == torch.uint8
            assert batch["index"].dtype == batch["epoch"].dtype == torch.int64
            assert len(batch["key"]) == len(batch["caption"]) == 8
            assert batch["key"] == [f"{index:08d}" for index in batch["index"].tolist()]
        epochs = torch.cat([batch["epoch"] for batch in batches])
        assert epochs.tolist() == [position // 29 for position in range(80)]

    @pytest.mark.parametrize("options", [{"num_workers": 2}, {"cache_bytes": 0}, {"cache_bytes": 0, "num_workers": 2}])
    def test_workers_and_cache_change_nothing(self, make, options):
        expected = list(make().train_dataloader())
        assert all(map(same, make(**options).train_dataloader(), expected))

    def test_global_generators_are_left_alone(self, make):
        data = make()
        torch.manual_seed(0)
        np.random.seed(0)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        list(data.train_dataloader())
        list(data.val_dataloader())
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    def test_flip_follows_the_sample(self, make):
        plain = {int(i): image for b in make(flip_prob=0.0).train_dataloader() for i, image in pairs_of(b)}
        flipped = {}
        for batch in make(batch_size=8).train_dataloader():
            for (index, image), epoch in zip(pairs_of(batch), batch["epoch"].tolist(), strict=True):
                turned = torch.equal(image, plain[index].flip(-1)) and not torch.equal(image, plain[index])
                assert turned or torch.equal(image, plain[index])
                flipped[epoch, index] = turned
        assert 0.3 < np.mean(list(flipped.values())) < 0.7
        for batch in make(batch_size=5).train_dataloader():  # other batches, same draws
            for (index, image), epoch in zip(pairs_of(batch), batch["epoch"].tolist(), strict=True):
                if (epoch, index) in flipped:
                    assert torch.equal(image, plain[index].flip(-1) if flipped[epoch, index] else plain[index])

    def test_one_of_several_captions_each_epoch(self, make_tar, encoded, make):
        caption = b'{"captions": ["a", "b", "c"]}'
        path = str(make_tar([(f"{n}.{e}", d) for n in range(4) for e, d in (("png", encoded(n)), ("json", caption))]))
        data = make(source=Shards(path, path), budget_images=160)
        seen = [caption for batch in data.train_dataloader() for caption in batch["caption"]]
        assert set(seen) == {"a", "b", "c"}
        assert {c for batch in data.val_dataloader() for c in batch["caption"]} == {"a"}

    def test_an_epoch_smaller_than_the_batch(self, make):
        (first, second) = make(batch_size=64, budget_images=128).train_dataloader()
        assert first["epoch"].tolist() == [0] * 29 + [1] * 29 + [2] * 6
        assert second["epoch"][0] == 2


def pairs_of(batch: Batch) -> list[tuple[int, torch.Tensor]]:
    return list(zip(batch["index"].tolist(), batch["image"], strict=True))


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("done", [0, 1, 4, 10])
    def test_the_rest_is_the_same(self, make, workers, done):
        data = make(num_workers=workers)
        expected = list(make().train_dataloader())
        interrupted = data.train_dataloader()
        iterator = iter(interrupted)
        for _ in range(done):
            next(iterator)
        resumed = make(num_workers=workers).train_dataloader()
        resumed.load_state_dict(interrupted.state_dict())
        rest = list(resumed)
        assert len(resumed) == 10
        assert len(rest) == 10 - done
        assert all(map(same, rest, expected[done:]))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_through_lightning(self, make, tmp_path, workers):
        straight = fit(make(num_workers=workers))
        checkpoint = tmp_path / "stop.ckpt"
        first = fit(make(num_workers=workers), StopAt(4, checkpoint))
        second = fit(make(num_workers=workers), checkpoint=checkpoint)
        batches = first.batches + second.batches
        assert (len(first.batches), len(second.batches), len(straight.batches)) == (4, 6, 10)
        assert all(map(same, batches, straight.batches))
        assert torch.equal(second.weight, straight.weight)
        state = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert [loader["batches_done"] for loader in state] == [4]

    def test_through_lightning_after_validation_in_the_middle(self, make, tmp_path):
        checkpoint = tmp_path / "stop.ckpt"
        first = fit(make(), StopAt(6, checkpoint), val_check_interval=3)
        second = fit(make(), checkpoint=checkpoint, val_check_interval=3)
        assert all(map(same, first.batches + second.batches, make().train_dataloader()))
        assert len(first.batches + second.batches) == 10

    def test_a_larger_budget_goes_on(self, make):
        loader = make(budget_images=40).train_dataloader()
        assert len(list(loader)) == 5
        assert list(loader) == []
        longer = make().train_dataloader()
        longer.load_state_dict(loader.state_dict())
        assert all(map(same, longer, list(make().train_dataloader())[5:]))

    @pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 4}, {"window_shards": 1}])
    def test_refuses_another_order(self, make, change):
        state = make().train_dataloader().state_dict()
        (name,) = change
        with pytest.raises(UserError, match=rf"can't resume: .* \({name}\) is {change[name]} but was"):
            make(**change).train_dataloader().load_state_dict(state)

    def test_refuses_other_data(self, make, make_tar, pairs):
        state = make().train_dataloader().state_dict()
        path = str(make_tar(pairs(29)))
        with pytest.raises(UserError, match="can't resume: the training data"):
            make(source=Shards(path, path)).train_dataloader().load_state_dict(state)


class TestProcesses:
    def ranks(self, monkeypatch, data: ImageData, world: int, loader: Callable[[], Any]) -> list[list[Batch]]:
        """What each of `world` processes gets; only what torch.distributed says of the process is set."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        batches = []
        for rank in range(world):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            batches.append(list(loader()))
        return batches

    @pytest.mark.parametrize("world", [2, 4])
    def test_training_batches_are_shared(self, make, monkeypatch, world):
        alone = list(make().train_dataloader())
        data = make()
        parts = self.ranks(monkeypatch, data, world, data.train_dataloader)
        for number, batch in enumerate(alone):
            images = torch.cat([part[number]["image"] for part in parts])
            assert torch.equal(images, batch["image"])

    @pytest.mark.parametrize("world", [1, 2, 4, 16])
    def test_evaluation_sees_each_sample_once(self, make, monkeypatch, world):
        data = make()
        parts = self.ranks(monkeypatch, data, world, data.val_dataloader)
        seen = [index for part in parts for batch in part for index in batch["index"].tolist()]
        assert sorted(seen) == list(range(11))
        assert data.num_samples("tune") == 11

    def test_batch_that_can_not_be_shared(self, make, monkeypatch):
        data = make()
        with pytest.raises(UserError, match="batch_size 8 can't be shared by 3 processes"):
            self.ranks(monkeypatch, data, 3, data.train_dataloader)


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_is_the_same_every_time(self, make, workers):
        loader = make(num_workers=workers, decode="draft1x").eval_dataloader("test")
        next(iter(loader))  # a pass that is broken off
        first, second = list(loader), list(loader)
        assert len(loader) == len(first) == len(second) == 2
        assert all(map(same, first, second))
        assert torch.cat([batch["index"] for batch in first]).tolist() == list(range(10))

    def test_lightning_validates_on_tune(self, make):
        module = fit(make(), num_sanity_val_steps=0)
        assert sorted(module.tuned) == list(range(11))


class TestDamagedImages:
    """Damage that no header shows: found when the image is decoded."""

    @pytest.fixture
    def source(self, make_tar, pairs, encoded) -> Shards:
        whole = encoded(0, (40, 40))
        bad = (b"0050.png", whole[: len(whole) // 2])
        members = [*pairs(50), (bad[0].decode(), bad[1]), ("0050.txt", b"bad"), *pairs(49, first=51)]
        path = str(make_tar(members))
        return Shards(path, path)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_next_sample_stands_in(self, make, source, caplog, workers):
        data = make(source=source, budget_images=200, num_workers=workers, window_shards=1)
        with caplog.at_level(logging.WARNING):
            batches = list(data.train_dataloader())
        counts = np.bincount(torch.cat([batch["index"] for batch in batches]).numpy(), minlength=100)
        assert counts[50] == 0
        assert counts[51] == 4
        assert set(counts[[n for n in range(100) if n not in (50, 51)]]) == {2}
        assert [record.message for record in caplog.records if "damaged image" in record.message] == [
            f"0050 in {source.shards('train')[0]}: damaged image; the next sample stands in (1 so far)"
        ]

    def test_too_many(self, make, source):
        data = make(source=source, budget_images=200, max_bad_fraction=0.009)
        with pytest.raises(UserError, match=r"1 of 100 samples are damaged \{'damaged image': 1\}, more than"):
            list(data.train_dataloader())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_skips_nothing(self, make, source, workers):
        with pytest.raises(UserError, match=r"^0050 in .*: damaged image; take it out of the shard"):
            list(make(source=source, num_workers=workers).val_dataloader())

    def test_no_image_is_whole(self, make, make_tar, encoded):
        whole = encoded(0, (40, 40))
        path = str(make_tar([(f"{n}.png", whole[: len(whole) // 2]) for n in range(3)]))
        data = make(source=Shards(path, path), max_bad_fraction=1.0)
        with pytest.raises(UserError, match="no image of the dataset can be decoded"):
            list(data.train_dataloader())


def test_report(make, make_tar, pairs, encoded, caplog):
    members = [*pairs(200), ("alone.txt", b"x"), ("img.v1.0.png", encoded(1)), ("img.v1.0.txt", b"\xff")]
    path = str(make_tar(members))
    with caplog.at_level(logging.WARNING):
        make(source=Shards(path, path))
    text = caplog.text
    assert "train: damaged, left out: 1 x no image" in text
    assert "train: noted: 1 x caption bytes that are not UTF-8, replaced" in text
    assert "train: keys with dots, which other WebDataset readers merge: img.v1.0" in text


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"budget_images": 0}, "budget_images: got 0"),
        ({"flip_prob": 2.0}, "flip_prob: got 2.0"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction: got -0.1"),
        ({"missing_caption": "ignore"}, "missing_caption: got 'ignore'"),
        ({"decode": "fast"}, "decode: got 'fast'"),
        ({"window_shards": 0}, "window_shards: got 0"),
    ],
)
def test_impossible_arguments(make, option, text):
    with pytest.raises(ValueError, match=text):
        make(**option)
