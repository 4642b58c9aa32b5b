"""Training on latents is training on the images: same samples, flips and captions, resumed exactly, refused by name."""

import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.latent_data import LatentData
from fluxflow_train.data.loader import checked
from fluxflow_train.data.sources.shapes import Shapes
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.errors import UserError
from fluxflow_train.models.text import Backbone
from fluxflow_train.pixels import dequantize

Batch = dict[str, Any]
TENSORS = ("latent_mean", "latent_logvar", "text_hidden", "text_mask", "index", "epoch")


class Bytes(Backbone):
    """Each byte's hidden state depends on the byte and on how many there are."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(width=6, max_tokens=24)
        self.table = nn.Embedding(256, 6)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(seed))
        self.requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.table.weight.numpy().tobytes()).hexdigest()

    def token_ids(self, caption: str) -> list[int]:
        return [2, *caption.encode()[:22], 3]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.table(ids) / mask.sum(1)[:, None, None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def shapes(root: Path) -> Shapes:
    return Shapes(str(root), resolution=32, num_train=29, num_tune=11, num_test=10)


@pytest.fixture
def images(shapes: Shapes, root: Path) -> Callable[..., ImageData]:
    def data(**options: Any) -> ImageData:
        arguments: dict[str, Any] = {
            "source": shapes,
            "resolution": 32,
            "batch_size": 8,
            "budget_images": 76,  # 10 batches: two and three quarters of an epoch
            "seed": 3,
            "flip_prob": 0.5,
            "cache_dir": str(root),
        }
        return ImageData(**arguments | options)

    return data


@pytest.fixture
def make(images, vae, root) -> Callable[..., LatentData]:
    """Prepared; what is the same as in an earlier test is there already."""

    def data(
        vae_sha256: str = "ab" * 32, backbone: Backbone | None = None, text: bool = True, **options: Any
    ) -> LatentData:
        backbone = backbone or (Bytes() if text else None)
        module = LatentData(images(**options), vae, vae_sha256, backbone, str(root), "cpu")
        module.prepare_data()
        return module

    return data


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(one[name], other[name]) for name in TENSORS)
    return tensors and one["key"] == other["key"] and one["caption"] == other["caption"]


def num_captions(data: LatentData) -> int:
    text = data.text()
    assert text is not None
    return len(text)


class TestSameAsImages:
    @pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"cache_bytes": 0}])
    @torch.no_grad()
    def test_training(self, make, images, vae, options):
        latents = list(make(**options).train_dataloader())
        live = list(images().train_dataloader())
        assert len(latents) == len(live) == 10
        for batch, expected in zip(latents, live, strict=True):
            assert set(batch) == set(TENSORS) | {"key", "caption"}
            assert torch.equal(batch["index"], expected["index"])
            assert torch.equal(batch["epoch"], expected["epoch"])
            assert (batch["key"], batch["caption"]) == (expected["key"], expected["caption"])
            # The image that live training sees, flipped or not, and nothing else has these latents.
            mean, logvar = vae.posterior(dequantize(expected["image"]))
            assert batch["latent_mean"].dtype == batch["latent_logvar"].dtype == torch.float32
            torch.testing.assert_close(batch["latent_mean"], mean, rtol=2**-11, atol=1e-5)
            torch.testing.assert_close(batch["latent_logvar"], logvar, rtol=2**-11, atol=1e-5)

    @torch.no_grad()
    def test_flips_matter(self, make, images, vae):
        live = [image for batch in images(flip_prob=0.0).train_dataloader() for image in batch["image"]]
        plain = vae.posterior(dequantize(torch.stack(live)))[0]
        means = torch.cat([batch["latent_mean"] for batch in make().train_dataloader()])
        flipped = (means - plain).flatten(1).abs().amax(1) > 0.01
        assert 0.3 < flipped.float().mean() < 0.7

    @pytest.mark.parametrize("split", ["train", "tune", "test"])
    @torch.no_grad()
    def test_evaluation(self, make, images, vae, split):
        for batch, expected in zip(make().eval_dataloader(split), images().eval_dataloader(split), strict=True):
            assert torch.equal(batch["index"], expected["index"])
            assert batch["caption"] == expected["caption"]
            mean = vae.posterior(dequantize(expected["image"]))[0]
            torch.testing.assert_close(batch["latent_mean"], mean, rtol=2**-11, atol=1e-5)

    def test_captions_each_epoch(self, make, images, make_tar, encoded):
        several, none = b'{"captions": ["a", "b", "c"]}', b"{}"
        members = [
            (f"{n}.{e}", d) for n in range(4) for e, d in (("png", encoded(n)), ("json", several if n else none))
        ]
        path = str(make_tar(members))
        options = {"source": Shards(path, path), "budget_images": 160}
        seen = [batch["caption"] for batch in make(**options).train_dataloader()]
        assert seen == [batch["caption"] for batch in images(**options).train_dataloader()]
        assert {caption for captions in seen for caption in captions} == {"", "a", "b", "c"}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_damage(self, make, images, make_tar, pairs, encoded, caplog, workers):
        whole = encoded(0, (40, 40))
        bad = [("0050.png", whole[: len(whole) // 2]), ("0050.txt", b"bad")]
        sound = str(make_tar(pairs(3), name="sound.tar"))
        path = str(make_tar([*pairs(50), *bad, *pairs(49, first=51)]))
        options = {"source": Shards(path, sound), "budget_images": 200, "num_workers": workers}
        live = [(batch["index"].tolist(), batch["caption"]) for batch in images(**options).train_dataloader()]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = list(make(**options).train_dataloader())
        assert [(batch["index"].tolist(), batch["caption"]) for batch in batches] == live
        assert [m for m in caplog.messages if "damaged image" in m] == [
            f"0050 in {path}: damaged image; the next sample stands in (1 so far)"
        ]

    def test_surface(self, make, images):
        data, live = make(), images()
        for name in ("batch_size", "num_batches", "seed", "resolution", "source"):
            assert getattr(data, name) == getattr(live, name)
        assert [data.num_samples(split) for split in ("train", "tune", "test")] == [29, 11, 10]
        assert torch.equal(data.images("tune", [4, 2]), live.images("tune", [4, 2]))


class TestText:
    def test_is_what_the_backbone_says(self, make):
        backbone = Bytes()
        for batch in make().train_dataloader():
            hidden, mask = backbone.encode(batch["caption"])
            longest = mask.shape[1]
            assert batch["text_hidden"].shape == (8, -(-longest // 8) * 8, 6)
            assert (batch["text_hidden"].dtype, batch["text_mask"].dtype) == (torch.float32, torch.bool)
            torch.testing.assert_close(batch["text_hidden"][:, :longest], hidden, rtol=2**-11, atol=1e-7)
            assert torch.equal(batch["text_mask"][:, :longest], mask)
            assert not batch["text_hidden"][~batch["text_mask"]].any()

    def test_a_trained_backbone_leaves_it_out(self, make):
        with pytest.raises(ValueError, match="backbone: got one that is trained, expected a frozen one, or None"):
            make(backbone=Bytes().requires_grad_(True))
        batch = next(iter(make(text=False).train_dataloader()))
        assert set(batch) == {"latent_mean", "latent_logvar", "index", "epoch", "key", "caption"}

    def test_captions_of_other_data_are_added(self, make, images, vae, root, make_tar, encoded):
        before = num_captions(make())
        members = [(f"{n}.{e}", d) for n in range(3) for e, d in (("png", encoded(n)), ("txt", b"new here %d" % n))]
        path = str(make_tar(members))
        data = LatentData(images(source=Shards(path, path)), vae, "ab" * 32, Bytes(), str(root), "cpu")
        assert num_captions(data) == before
        data.prepare_data()
        assert num_captions(data) == before + 3
        batch = next(iter(data.val_dataloader()))
        assert batch["caption"] == ["new here 0", "new here 1", "new here 2"]
        assert batch["text_mask"].sum(1).tolist() == [12, 12, 12]

    def test_before_it_was_prepared(self, make):
        data = make(text=False)
        data.backbone = Bytes(seed=1)
        with pytest.raises(UserError, match=r"no text cache in .*: write one with python -m fluxflow_train.prepare"):
            data.train_dataloader()


class TestPreparation:
    def test_is_done_once(self, make, vae, monkeypatch):
        make()

        def refuse(*arguments: Any) -> None:
            raise AssertionError("nothing is missing")

        monkeypatch.setattr(vae, "posterior", refuse)
        monkeypatch.setattr(Bytes, "encode", refuse)
        make()

    def test_runs_in_evaluation_mode(self, make, vae):
        vae.train()
        make(vae_sha256="01" * 32)
        assert not vae.training

    def test_before_it(self, images, vae, root):
        data = LatentData(images(), vae, "99" * 32, Bytes(), str(root), "cpu")
        data.image_data.prepare_data()
        with pytest.raises(UserError, match=r"holds no finished latents: prepare them first"):
            data.train_dataloader()

    def test_another_vae_gets_latents_of_its_own(self, make, root):
        make()
        before = set(root.glob("latents-*"))
        make(vae_sha256="12" * 32)
        assert len(set(root.glob("latents-*")) - before) == 1

    def test_latents_that_were_moved_to_another_vae(self, make, images, vae, root):
        make()
        data = LatentData(images(), vae, "34" * 32, Bytes(), str(root), "cpu")
        theirs, ours = (d._latent_folder("train").parent for d in (make(), data))
        ours.symlink_to(theirs)
        with pytest.raises(UserError, match=r"these latents are of another VAE \(vae_sha256 is abab\w*, expected 3434"):
            data.prepare_data()

    def test_a_folder_that_can_not_be_written(self, images, vae, root, tmp_path):
        (tmp_path / "file").touch()
        data = LatentData(images(), vae, "ab" * 32, Bytes(), str(tmp_path / "file"), "cpu")
        with pytest.raises(UserError, match=r"can't write latents to .*; choose another data root"):
            data.prepare_data()


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("done", [1, 4, 10])
    def test_the_rest_is_the_same(self, make, workers, done):
        expected = list(make().train_dataloader())
        interrupted = make(num_workers=workers).train_dataloader()
        iterator = iter(interrupted)
        for _ in range(done):
            next(iterator)
        resumed = make(num_workers=workers).train_dataloader()
        resumed.load_state_dict(interrupted.state_dict())
        rest = list(resumed)
        assert len(rest) == 10 - done
        assert all(map(same, rest, expected[done:]))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_through_lightning(self, make, tmp_path, workers):
        checkpoint = tmp_path / "stop.ckpt"
        first = fit(make(num_workers=workers), StopAt(4, checkpoint))
        second = fit(make(num_workers=workers), checkpoint=checkpoint)
        assert len(first.batches) == 4
        assert all(map(same, [*first.batches, *second.batches], make().train_dataloader()))
        assert len(first.batches) + len(second.batches) == 10
        assert sorted(second.tuned[-11:]) == list(range(11))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"vae_sha256": "cd" * 32}, r"the VAE of the latents \(vae_sha256\) is (cd){32} but was (ab){32}"),
            ({"backbone": Bytes(seed=2)}, r"the text backbone \(text_fingerprint\) is \w{64} but was \w{64}"),
            ({"text": False}, r"the text backbone \(text_fingerprint\) is None but was \w{64}"),
            ({"seed": 4}, r"the seed \(seed\) is 4 but was 3"),
        ],
    )
    def test_refuses_something_else(self, make, change, text):
        state = make().train_dataloader().state_dict()
        with pytest.raises(UserError, match=rf"^can't resume: {text} when the checkpoint was written; set it back"):
            make(**change).train_dataloader().load_state_dict(state)

    def test_refuses_images_for_latents_and_the_reverse(self, make, images):
        latents, live = make().train_dataloader(), images().train_dataloader()
        with pytest.raises(UserError, match=r"\(vae_sha256\) is None but was abab"):
            live.load_state_dict(latents.state_dict())
        with pytest.raises(UserError, match=r"\(vae_sha256\) is abab\w* but was None"):
            latents.load_state_dict(live.state_dict())

    def test_a_copy_for_a_spawned_worker_reads_the_same(self, make):
        data = make(cache_bytes=0)
        reader = data.train_dataloader()._reader
        copy = pickle.loads(pickle.dumps(reader))
        request = [(0, 5), (1, 7)]
        assert same(checked(copy[request]), checked(reader[request]))


class TestProcesses:
    @pytest.mark.parametrize("world", [2, 4])
    def test_share_each_batch(self, make, monkeypatch, world):
        alone = list(make().train_dataloader())
        data = make()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        parts, tuned = [], []
        for rank in range(world):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            parts.append(list(data.train_dataloader()))
            tuned += [index for batch in data.val_dataloader() for index in batch["index"].tolist()]
        for number, batch in enumerate(alone):
            assert torch.equal(torch.cat([part[number]["latent_mean"] for part in parts]), batch["latent_mean"])
        assert sorted(tuned) == list(range(11))


class Recorder(LightningModule):
    """Keeps every batch that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []
        self.tuned: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch["latent_mean"].mean()

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


def fit(data: LatentData, *callbacks: Callback, checkpoint: Path | None = None) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module
