import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxflow_train.data import text_cache
from fluxflow_train.data.text_cache import TextCache
from fluxflow_train.errors import UserError
from fluxflow_train.models.text_scratch import ScratchBackbone

FINGERPRINT = "f" * 64
WIDTH = 4
CAPTIONS = ["a red circle", "", "a red circle", "🙂🎨", "grün, 赤い円", "long " * 40, "a blue square"]


def states(caption: str) -> Tensor:
    """One token per byte and two marks; values that fp16 holds exactly."""
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
    return (
        torch.randint(-999, 999, (len(caption.encode()) + 2, WIDTH), generator=torch.Generator().manual_seed(seed)) / 8
    )


class Encoder:
    """Pads with garbage, keeps what it was asked for, and stops working after `calls`."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls = calls
        self.asked: list[str] = []

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += captions
        rows = [states(caption) for caption in captions]
        hidden = torch.full((len(rows), max(map(len, rows)) + 1, WIDTH), torch.nan)
        mask = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        for i, row in enumerate(rows):
            hidden[i, : len(row)], mask[i, : len(row)] = row, True
        return hidden, mask


def expect(cache: TextCache, captions: list[str]) -> None:
    hidden, mask = cache.lookup(captions)
    rows = [states(caption) for caption in captions]
    assert hidden.shape == (len(rows), max(map(len, rows)), WIDTH)
    assert (hidden.dtype, mask.dtype) == (torch.float32, torch.bool)
    for i, row in enumerate(rows):
        assert torch.equal(hidden[i, : len(row)], row)
        assert hidden[i, len(row) :].eq(0).all()
        assert mask[i].tolist() == [True] * len(row) + [False] * (mask.shape[1] - len(row))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "text"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "CAPTIONS_AT_ONCE", 2)
    monkeypatch.setattr(text_cache, "SHARD_TOKENS", 1)


def test_round_trip(folder: Path) -> None:
    cache = TextCache.create(folder, FINGERPRINT)
    assert cache.extend(CAPTIONS, Encoder()) == len(cache) == 6
    for reader in (cache, TextCache.open(folder), pickle.loads(pickle.dumps(cache))):
        assert reader.missing([*CAPTIONS, "new", "other", "new"]) == ["new", "other"]
        expect(reader, CAPTIONS)
        expect(reader, ["", ""])
        expect(reader, ["🙂🎨"])


def test_each_caption_is_encoded_once_the_short_ones_first(folder: Path) -> None:
    encoder = Encoder()
    TextCache.create(folder, FINGERPRINT).extend(CAPTIONS, encoder)
    assert encoder.asked == sorted(set(CAPTIONS), key=lambda caption: (len(caption), caption))
    assert TextCache.create(folder, FINGERPRINT).extend(CAPTIONS, Encoder(calls=0)) == 0


@pytest.mark.usefixtures("small_shards")
def test_many_shards_grow_over_several_calls(folder: Path) -> None:
    captions = [f"{number} {'x' * (number % 7)}" for number in range(50)]
    TextCache.create(folder, FINGERPRINT).extend(captions[:21], Encoder())
    cache = TextCache.create(folder, FINGERPRINT)
    second = Encoder()
    assert cache.extend(captions, second) == 29
    assert set(second.asked) == set(captions[21:])
    assert len(list(folder.glob("*.safetensors"))) == 11 + 15
    for reader in (cache, TextCache.open(folder)):
        expect(reader, captions)


@pytest.mark.usefixtures("small_shards")
def test_interrupted_it_keeps_finished_shards(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        TextCache.create(folder, FINGERPRINT).extend(CAPTIONS, Encoder(calls=2))
    (folder / ".text-00002.safetensors.tmp").write_bytes(b"half of a shard")
    (folder / "text-00002.safetensors").write_bytes(b"a shard that no manifest names")
    cache = TextCache.create(folder, FINGERPRINT)
    assert len(cache) == 4
    rest = Encoder()
    assert cache.extend(CAPTIONS, rest) == len(rest.asked) == 2
    expect(TextCache.open(folder), CAPTIONS)
    assert [path.name for path in folder.glob(".*")] == [".lock"]


def test_values_do_not_depend_on_the_history(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = ScratchBackbone(16, num_layers=2, num_heads=2, hidden=16, activation="bezier")
    captions = [f"{color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "ring")]
    once, bitwise = (TextCache.create(tmp_path / name, backbone.fingerprint) for name in ("once", "bitwise"))
    with torch.no_grad():
        once.extend(captions, backbone.encode)
        for caption in reversed(captions):
            bitwise.extend([caption], backbone.encode)
        direct = backbone.encode(captions)[0].half().float()
    assert torch.equal(once.lookup(captions)[0], bitwise.lookup(captions)[0])
    assert torch.equal(once.lookup(captions)[0], direct)


def test_the_key_is_of_backbone_and_caption(folder: Path) -> None:
    TextCache.create(folder, FINGERPRINT).extend(["a caption"], Encoder())
    shard = load_file(folder / "text-00000.safetensors")
    key = hashlib.sha256(f"{FINGERPRINT}\na caption".encode()).digest()
    assert shard["keys"].numpy().tobytes() == key
    assert shard["hidden"].dtype == torch.float16
    assert len(shard["hidden"]) == len(states("a caption"))


def test_keys_that_begin_alike_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(self: TextCache, caption: str) -> bytes:
        return b"\xff" * 8 + hashlib.sha256(caption.encode()).digest()[:24]

    monkeypatch.setattr(TextCache, "_key", key)
    cache = TextCache.create(folder, FINGERPRINT)
    cache.extend(CAPTIONS, Encoder())
    expect(cache, CAPTIONS)
    assert cache.missing(["new"]) == ["new"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_it_is_memory_mapped(folder: Path) -> None:
    TextCache.create(folder, FINGERPRINT).extend(CAPTIONS, Encoder())
    cache = TextCache.open(folder)
    assert str(folder / "text-00000.safetensors") in Path("/proc/self/maps").read_text()
    del cache


def test_many_captions(folder: Path) -> None:
    captions = [f"caption {number}" for number in range(20_000)]

    def encode(batch: list[str]) -> tuple[Tensor, Tensor]:
        hidden = torch.tensor([[float(caption.split()[1])] for caption in batch]).expand(-1, 3).div(16)
        return hidden[..., None], torch.ones(len(batch), 3, dtype=torch.bool)

    TextCache.create(folder, FINGERPRINT).extend(captions, encode)
    cache = TextCache.open(folder)
    picked = np.random.default_rng(0).permutation(20_000)[:3000]
    hidden, _ = cache.lookup([captions[number] for number in picked])
    assert torch.equal(hidden[:, 0, 0], torch.tensor(picked / 16).half().float())
    assert not cache.missing(captions)


class TestRefusals:
    @pytest.fixture
    def written(self, folder: Path) -> Path:
        TextCache.create(folder, FINGERPRINT).extend(CAPTIONS, Encoder())
        return folder

    def refuse(self, call: Callable[[], object], message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    def test_another_backbones_cache(self, written: Path) -> None:
        self.refuse(
            lambda: TextCache.create(written, "e" * 64), "another text backbone .*ffffffffffff, in use eeeeeeeeeeee"
        )
        self.refuse(lambda: TextCache.open(written).check("e" * 64), "another text backbone")
        TextCache.open(written).check(FINGERPRINT)

    def test_no_cache(self, folder: Path) -> None:
        self.refuse(lambda: TextCache.open(folder), "no text cache in .*fluxflow_train.prepare")

    def test_a_caption_that_is_not_there(self, written: Path) -> None:
        self.refuse(lambda: TextCache.open(written).lookup(["a red circle", "line\nline"]), r"'line\\nline' is not in")
        self.refuse(lambda: TextCache.create(written.with_name("new"), FINGERPRINT).lookup(["a"]), "'a' is not in")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda shard, manifest: shard.unlink(),
            lambda shard, manifest: shard.write_bytes(shard.read_bytes()[:-8]),
            lambda shard, manifest: shard.write_bytes(b"\xff" * shard.stat().st_size),
            lambda shard, manifest: manifest.write_text("{"),
            lambda shard, manifest: manifest.write_text("[]"),
            lambda shard, manifest: manifest.write_text(json.dumps({"version": 99})),
        ],
    )
    def test_damage(self, written: Path, damage: Callable[[Path, Path], object]) -> None:
        damage(written / "text-00000.safetensors", written / "manifest.json")
        self.refuse(lambda: TextCache.open(written), "delete the .*folder and run prepare again")


def test_several_processes_extend_it(tmp_path):
    """Each has opened it before any other wrote."""
    caches = [TextCache.create(tmp_path, FINGERPRINT) for _ in range(3)]
    for number, cache in enumerate(caches):
        cache.extend([f"caption {number}", "for all"], Encoder())
    expect(TextCache.open(tmp_path), ["caption 0", "caption 1", "caption 2", "for all"])


def test_token_lengths_in_the_manifest(tmp_path):
    TextCache.create(tmp_path, FINGERPRINT).extend(["a", "bcd", "ef"], Encoder())
    lengths = json.loads((tmp_path / "manifest.json").read_text())["token_lengths"]
    assert lengths == {"captions": 3, "mean": 4.0, "p50": 4.0, "p95": 4.9, "p99": 4.98, "max": 5}
