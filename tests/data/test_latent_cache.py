"""Latents on disk: the values of the live posterior, kept through interruptions, refused where they are of another."""

import hashlib
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.data.buckets import Buckets
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.latent_cache import SAMPLES_PER_SHARD, LatentCache, latent_folder
from fluxflow_train.data.latent_writer import BATCH, write_latents
from fluxflow_train.data.lock import held
from fluxflow_train.data.selection import Selection
from fluxflow_train.data.sources.shapes import Shapes
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.errors import UserError
from fluxflow_train.models.vae import VAE
from fluxflow_train.pixels import dequantize

VAE_SHA256 = "ab" * 32
IN_MEMORY, MAPPED = 2**30, 0


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """A posterior that costs nothing: (B, 3, R, R) to (B, 3, R / 4, R / 4)."""
    return F.avg_pool2d(x, 4), F.avg_pool2d(x.square(), 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Two shards of latents and a bit of a third batch."""
    root = str(tmp_path_factory.mktemp("shapes"))
    source = Shapes(root, resolution=16, num_train=SAMPLES_PER_SHARD + 70, num_tune=40, num_test=1)
    data = ImageData(source, 16, 8, 80, seed=0, cache_dir=root)
    data.prepare_data()
    return data


@pytest.fixture
def of_tar(make_tar: Callable[..., Path], cache: Path) -> Callable[..., Selection]:
    """The selection of a tar of the given members."""

    def select(members: list[tuple[str, bytes]], **options: Any) -> Selection:
        path = str(make_tar(members))
        return ImageData(Shards(path, path), 16, 8, 80, seed=0, cache_dir=str(cache), **options).selection("train")

    return select


def write(folder: Path, selection: Selection, posterior: Any = pooled, **options: Any) -> None:
    arguments = {"vae_sha256": VAE_SHA256, "device": "cpu", "num_workers": 0, "tolerant": False}
    buckets = Buckets.square(16, len(selection))
    write_latents(folder, selection, buckets, posterior, **arguments | options)


def read(folder: Path, selection: Selection, cache_bytes: int = MAPPED, **options: Any) -> LatentCache:
    buckets = Buckets.square(16, len(selection)).fingerprint
    arguments = {"vae_sha256": VAE_SHA256, "fingerprint": selection.fingerprint, "buckets": buckets}
    return LatentCache.open(folder, **arguments | options, cache_bytes=cache_bytes)


def altered(path: Path, position: int) -> None:
    """Change one byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def written(images: ImageData, vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "tune"
    write(folder, images.selection("tune"), vae.posterior)
    return folder


class TestValues:
    @pytest.mark.parametrize("cache_bytes", [IN_MEMORY, MAPPED])
    @pytest.mark.parametrize("flipped", [False, True])
    @torch.no_grad()
    def test_are_those_of_the_live_posterior(self, images, vae, written, cache_bytes, flipped):
        cache = read(written, images.selection("tune"), cache_bytes)
        assert len(cache) == 40
        for sample in range(40):
            image = images.images("tune", [sample])
            mean, logvar = vae.posterior(dequantize(image.flip(-1) if flipped else image))
            latent = cache.read(sample, flipped)
            assert latent.mean.dtype == latent.logvar.dtype == torch.float32
            # Half a unit in the last of fp16's 11 bits, and what another batch size changes in fp32.
            torch.testing.assert_close(latent.mean, mean[0], rtol=2**-11, atol=1e-5)
            torch.testing.assert_close(latent.logvar, logvar[0], rtol=2**-11, atol=1e-5)
        assert latent.logvar.std() > 0.01

    def test_the_flipped_latent_is_not_the_latent_flipped(self, images, written):
        cache = read(written, images.selection("tune"))
        assert (cache.read(0, True).mean - cache.read(0, False).mean.flip(-1)).abs().max() > 0.01

    def test_workers_change_nothing(self, images, vae, written, tmp_path):
        write(tmp_path / "tune", images.selection("tune"), vae.posterior, num_workers=2)
        for path in written.glob("*.*"):
            assert (tmp_path / "tune" / path.name).read_bytes() == path.read_bytes()

    def test_autocast_around_it_changes_nothing(self, images, vae, written, tmp_path):
        with torch.autocast("cpu", torch.bfloat16):
            write(tmp_path / "tune", images.selection("tune"), vae.posterior)
        assert [p.read_bytes() for p in (tmp_path / "tune").glob("*.safetensors")] == [
            p.read_bytes() for p in written.glob("*.safetensors")
        ]

    def test_a_copy_for_a_worker_reads_the_same(self, images, written):
        cache = read(written, images.selection("tune"))
        copy = pickle.loads(pickle.dumps(cache))
        assert torch.equal(copy.read(39, True).mean, cache.read(39, True).mean)

    @pytest.mark.parametrize("sample", [-1, 40])
    def test_there_is_no_such_sample(self, images, written, sample):
        with pytest.raises(IndexError, match=f"got {sample}, expected 0 to 39"):
            read(written, images.selection("tune")).read(sample, False)

    def test_manifest(self, images, written):
        manifest = json.loads((written / "manifest.json").read_text())
        (shard,) = manifest.pop("shards")
        assert shard["sha256"] == hashlib.sha256((written / shard["name"]).read_bytes()).hexdigest()
        assert shard["samples"] == 40
        assert manifest == {
            "version": 2,
            "vae_sha256": VAE_SHA256,
            "fingerprint": images.selection("tune").fingerprint,
            "buckets": Buckets.square(16, 40).fingerprint,
            "decode": "exact",
            "count": 40,
            "shapes": [[16, 16]],
            "dtype": "float16",
            "views": ["plain", "flipped"],
            "source": {"source": "shapes", "licence": "MIT, as the program that drew them"},
        }


class TestInterruption:
    def test_finished_shards_are_kept(self, images, tmp_path):
        selection = images.selection("train")
        write(tmp_path / "straight", selection)
        broken, calls = tmp_path / "broken", 0

        def dies(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            if calls > 2 * SAMPLES_PER_SHARD // BATCH + 1:  # plain and flipped; in the second shard
                raise KeyboardInterrupt
            return pooled(x)

        with pytest.raises(KeyboardInterrupt):
            write(broken, selection, dies)
        assert sorted(path.name for path in broken.iterdir()) == [
            ".latents-00000.lock",
            ".latents-00001.lock",
            "latents-00000.safetensors",
        ]
        with pytest.raises(UserError, match="holds no finished latents: prepare them first"):
            read(broken, selection)
        first = (broken / "latents-00000.safetensors").stat().st_mtime_ns
        calls = 0

        def counts(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            assert len(x) == BATCH
            return pooled(x)

        write(broken, selection, counts)
        assert calls == 2 * 3  # 70 samples
        assert (broken / "latents-00000.safetensors").stat().st_mtime_ns == first
        for path in (tmp_path / "straight").glob("*.*"):
            assert (broken / path.name).read_bytes() == path.read_bytes()
        write(broken, selection, dies)
        assert calls == 2 * 3
        cache = read(broken, selection)
        last = dequantize(images.images("train", [SAMPLES_PER_SHARD + 69]))
        torch.testing.assert_close(
            cache.read(SAMPLES_PER_SHARD + 69, False).mean, pooled(last)[0][0], rtol=1e-3, atol=0
        )

    @pytest.mark.parametrize("remains", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{", b"x" * 99])
    def test_half_a_shard_is_made_again(self, images, tmp_path, remains):
        (tmp_path / "latents-00000.safetensors").write_bytes(remains)
        write(tmp_path, images.selection("tune"))
        assert torch.isfinite(read(tmp_path, images.selection("tune"), IN_MEMORY).read(0, False).mean).all()

    def test_a_shard_of_another_vae_is_made_again(self, images, tmp_path):
        selection = images.selection("tune")
        write(tmp_path, selection, lambda x: (pooled(x)[0] + 1, pooled(x)[1]), vae_sha256="cd" * 32)
        (tmp_path / "manifest.json").unlink()
        write(tmp_path, selection)
        expected = pooled(dequantize(images.images("tune", [0])))[0][0]
        torch.testing.assert_close(read(tmp_path, selection).read(0, False).mean, expected, rtol=1e-3, atol=1e-4)

    def test_what_another_process_has_is_waited_for(self, images, tmp_path, caplog):
        writer = threading.Thread(target=write, args=(tmp_path, images.selection("train")))
        with caplog.at_level(logging.WARNING), held(tmp_path / ".latents-00000.lock", "testing"):
            writer.start()
            while not (tmp_path / "latents-00001.safetensors").exists():  # the other shard is made meanwhile
                time.sleep(0.05)
            writer.join(0.3)
            assert not (tmp_path / "manifest.json").exists()
        writer.join()
        assert (tmp_path / "manifest.json").exists()
        assert caplog.messages == ["waiting for the process that is encoding latents-00000.safetensors"]

    def test_several_processes_share_the_shards(self, images, tmp_path):
        selection, calls = images.selection("train"), []

        def counts(x: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(len(x))
            time.sleep(0.002)
            return pooled(x)

        writers = [threading.Thread(target=write, args=(tmp_path / "many", selection, counts)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert len(calls) == 2 * (SAMPLES_PER_SHARD // BATCH + 3)
        write(tmp_path / "one", selection)
        for path in (tmp_path / "one").glob("*.*"):
            assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes()


class TestRefusal:
    @pytest.fixture
    def folder(self, images, tmp_path) -> Path:
        write(tmp_path / "tune", images.selection("tune"))
        return tmp_path / "tune"

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"vae_sha256": "cd" * 32}, f"latents are of another VAE .vae_sha256 is {VAE_SHA256}, expected cdcd"),
            ({"fingerprint": "0123"}, "latents are of other images .fingerprint is [0-9a-f]{64}, expected 0123"),
            ({"buckets": "0123"}, "latents are of other shapes .buckets is [0-9a-f]{64}, expected 0123"),
        ],
    )
    def test_latents_of_something_else(self, images, folder, change, text):
        with pytest.raises(UserError, match=rf"{text}.*: choose another folder, or delete the folder") as error:
            read(folder, images.selection("tune"), **change)
        assert "\n" not in str(error.value)

    def test_writing_over_other_latents(self, images, folder):
        with pytest.raises(UserError, match="these latents are of another VAE"):
            write(folder, images.selection("tune"), vae_sha256="cd" * 32)

    def test_another_format(self, images, folder):
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"version": 2', '"version": 0'))
        with pytest.raises(UserError, match="written in another format"):
            read(folder, images.selection("tune"))

    def test_a_shard_that_was_cut(self, images, folder):
        shard = folder / "latents-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(
            UserError, match=r"latents-00000.safetensors is missing or not as its manifest says: delete"
        ):
            read(folder, images.selection("tune"))

    def test_a_shard_that_has_gone(self, images, folder):
        (folder / "latents-00000.safetensors").unlink()
        with pytest.raises(
            UserError, match=r"latents-00000.safetensors is missing or not as its manifest says: delete"
        ):
            read(folder, images.selection("tune"))

    def test_one_altered_byte(self, images, folder):
        altered(folder / "latents-00000.safetensors", -1)
        with pytest.raises(UserError, match=r"latents-00000.safetensors was altered since it was written: delete"):
            read(folder, images.selection("tune"), IN_MEMORY)

    def test_an_altered_header(self, images, folder):
        altered(folder / "latents-00000.safetensors", 8)
        with pytest.raises(UserError, match=r"latents-00000.safetensors was altered since it was written"):
            read(folder, images.selection("tune"), MAPPED).read(0, False)

    def test_a_damaged_manifest(self, images, folder):
        (folder / "manifest.json").write_text("{")
        with pytest.raises(UserError, match=r"manifest.json is damaged .*: delete the folder"):
            read(folder, images.selection("tune"))

    def test_a_folder_that_can_not_be_made(self, images, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"can't write latents to .*; choose another data root"):
            write(tmp_path / "file" / "tune", images.selection("tune"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_a_latent_that_is_not_finite(images, tmp_path, value):
    selection = images.selection("tune")
    bad = dequantize(images.images("tune", [37]))[0]

    def diverged(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = pooled(x)
        mean[(x == bad).all(dim=(1, 2, 3)), 1, 2, 3] = value
        return mean, logvar

    with pytest.raises(
        UserError, match=rf"^{selection.name(37)}: its latent is not finite in 16 bits .*; choose another"
    ):
        write(tmp_path, selection, diverged)


class TestDamagedImages:
    @pytest.fixture
    def members(self, pairs, encoded) -> list[tuple[str, bytes]]:
        whole = encoded(0, (40, 40))
        bad = [("0050.png", whole[: len(whole) // 2]), ("0050.txt", b"bad")]
        return [*pairs(50), *bad, *pairs(49, first=51)]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_next_one_stands_in(self, of_tar, members, tmp_path, num_workers):
        selection = of_tar(members)
        write(tmp_path, selection, tolerant=True, num_workers=num_workers)
        cache = read(tmp_path, selection)
        assert cache.damaged == {50: "damaged image"}
        assert torch.equal(cache.read(50, True).mean, cache.read(51, True).mean)
        assert not torch.equal(cache.read(49, True).mean, cache.read(51, True).mean)

    def test_is_an_error_elsewhere(self, of_tar, members, tmp_path):
        with pytest.raises(UserError, match=r"^0050 in .*: damaged image; take it out of the shard"):
            write(tmp_path, of_tar(members))

    def test_too_many(self, of_tar, members, tmp_path):
        with pytest.raises(UserError, match="1 of 100 samples are damaged"):
            write(tmp_path, of_tar(members, max_bad_fraction=0.009), tolerant=True)


def test_folders_of_different_content_differ(tmp_path):
    names = {
        latent_folder(tmp_path, *arguments)
        for arguments in (
            ("ab", ["x", "y"]),
            ("ac", ["x", "y"]),
            ("ab", ["x", "z"]),
        )
    }
    assert len(names) == 3
    assert all(path.parent == tmp_path and path.name.startswith("latents-") for path in names)
