"""Hidden states of captions, computed once: safetensors shards of valid tokens, found by content.

The key of a caption is sha256(fingerprint of the backbone, caption), so a cache serves any order, split or number of
captions, and a caption that many images share is stored once. Values are fp16.

Legend: B captions asked for, N captions and T tokens stored, S text tokens, W backbone width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluxflow_train.data.lock import alone
from fluxflow_train.data.progress import progress
from fluxflow_train.errors import UserError
from fluxflow_train.files import replacing, write_atomically

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]

MANIFEST = "manifest.json"
VERSION = 1
CAPTIONS_AT_ONCE = 256  # per call of `encode`
SHARD_TOKENS = 65_536  # a shard is closed when it has as many: 50 MB at W = 384, and the most that a kill can lose


class TextCache:
    """The cache in a folder, memory-mapped; any number of processes extend and read it."""

    def __init__(self, folder: Path, fingerprint: str, shards: Sequence[dict[str, Any]]) -> None:
        """See `open` and `create`, which say what the arguments are."""
        self.folder = folder
        self.fingerprint = fingerprint
        self._shards: list[dict[str, Any]] = []
        self._hidden: list[Tensor] = []  # (T, W) of each shard
        self._keys = np.zeros((0, 32), np.uint8)  # (N, 32) of all shards, sorted
        self._heads = np.zeros(0, np.uint64)  # (N,) their first 8 bytes, which are searched
        self._places = np.zeros((0, 3), np.int64)  # (N, 3): shard, first token, end
        self._add(shards)

    @classmethod
    def open(cls, folder: Path) -> "TextCache":
        """The cache that `prepare` left in `folder`.

        Raises:
            UserError: there is none, or it is damaged.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"no text cache in {folder}: write one with python -m fluxflow_train.prepare")
        return cls(folder, manifest["fingerprint"], manifest["shards"])

    @classmethod
    def create(cls, folder: Path, fingerprint: str) -> "TextCache":
        """The cache in `folder` of the backbone with this `fingerprint`, empty where there is none yet.

        Raises:
            UserError: another backbone's cache is there, or it is damaged.
        """
        if read_manifest(folder) is None:
            return cls(folder, fingerprint, [])
        cache = cls.open(folder)
        cache.check(fingerprint)
        return cache

    def check(self, fingerprint: str) -> None:
        """Raises UserError unless the cache was written by the backbone with this `fingerprint`."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the text cache in {self.folder} is of another text backbone (fingerprint {self.fingerprint[:12]}, in"
                f" use {fingerprint[:12]}): prepare with the backbone in use, into another folder or after deleting it"
            )

    def __reduce__(self) -> tuple[Callable[[Path], "TextCache"], tuple[Path]]:
        """A spawned worker maps the files anew rather than receive a copy of them."""
        return TextCache.open, (self.folder,)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, caption: str) -> bool:
        return self._row(caption) is not None

    def missing(self, captions: Sequence[str]) -> list[str]:
        """The captions that are not stored, each once, in the order in which they first come."""
        return [caption for caption in dict.fromkeys(captions) if caption not in self]

    def lookup(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """hidden float32 (B, S, W), zero where not valid, and mask bool (B, S), padded to the longest.

        Raises:
            UserError: a caption is not stored.
        """
        places = [self._place(caption) for caption in captions]
        longest = max(end - first for _, first, end in places)
        hidden = torch.zeros(len(places), longest, self._hidden[0].shape[1])
        mask = torch.zeros(len(places), longest, dtype=torch.bool)
        for i, (shard, first, end) in enumerate(places):
            hidden[i, : end - first] = self._hidden[shard][first:end]
            mask[i, : end - first] = True
        return hidden, mask

    def extend(self, captions: Sequence[str], encode: Encode) -> int:
        """Store what is missing of `captions`, and say how many that were.

        Every finished shard is kept when this is interrupted; called again it goes on with the rest.

        Args:
            encode: list of captions to hidden (B, S, W) and mask (B, S). The values must not depend on which captions
                come together (`Backbone.encode` sees to that), or the cache would depend on its history.
        """
        # In the order of their lengths, for the encoder's batches.
        wanted = sorted(self.missing(captions), key=lambda caption: (len(caption), caption))
        chunks = [wanted[first : first + CAPTIONS_AT_ONCE] for first in range(0, len(wanted), CAPTIONS_AT_ONCE)]
        keys: list[bytes] = []
        rows: list[Tensor] = []
        for chunk in progress(chunks, "encoding captions", total=len(chunks)):
            keys += [self._key(caption) for caption in chunk]
            rows += valid_rows(*encode(chunk))
            if sum(map(len, rows)) >= SHARD_TOKENS or chunk is chunks[-1]:
                self._write(keys, rows)
                keys, rows = [], []
        return len(wanted)

    def _write(self, keys: list[bytes], rows: list[Tensor]) -> None:
        """One more shard, then the manifest that names it: a reader never sees half of either."""
        tensors = {
            "hidden": torch.cat(rows),
            "ends": torch.tensor([len(row) for row in rows]).cumsum(0),
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32),
        }
        with alone(self.folder):
            manifest = read_manifest(self.folder)
            self._add([] if manifest is None else manifest["shards"][len(self._shards) :])  # of other processes
            name = f"text-{len(self._shards):05}.safetensors"
            with replacing(self.folder / name) as temporary:
                save_file(tensors, temporary)
            size = (self.folder / name).stat().st_size
            self._add([{"file": name, "bytes": size, "captions": len(keys)}])
            manifest = {
                "version": VERSION,
                "fingerprint": self.fingerprint,
                "token_lengths": self.token_lengths(),
                "shards": self._shards,
            }
            write_atomically(self.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def token_lengths(self) -> dict[str, float]:
        """Of the stored captions, marks included: their number, mean, quantiles and maximum."""
        lengths = self._places[:, 2] - self._places[:, 1]
        if not len(lengths):
            return {"captions": 0}
        quantiles = {f"p{q}": float(np.percentile(lengths, q)) for q in (50, 95, 99)}
        return {"captions": len(lengths), "mean": float(lengths.mean()), **quantiles, "max": int(lengths.max())}

    def _add(self, shards: Sequence[dict[str, Any]]) -> None:
        """Map `shards`, and sort their keys in among the others."""
        keys, places = [self._keys], [self._places]
        for shard in shards:
            number = len(self._shards)
            tensors = read_shard(self.folder / shard["file"], shard["bytes"])
            ends = tensors["ends"].numpy()
            starts = np.concatenate([[0], ends[:-1]])
            keys.append(tensors["keys"].numpy())
            places.append(np.stack([np.full_like(ends, number), starts, ends], axis=1))
            self._shards.append(shard)
            self._hidden.append(tensors["hidden"])
        stacked = np.concatenate(keys)
        heads = np.ascontiguousarray(stacked[:, :8]).view(">u8").astype(np.uint64).ravel()
        order = np.argsort(heads, kind="stable")
        self._keys, self._heads, self._places = stacked[order], heads[order], np.concatenate(places)[order]

    def _key(self, caption: str) -> bytes:
        return hashlib.sha256(f"{self.fingerprint}\n{caption}".encode("utf-8", "replace")).digest()

    def _row(self, caption: str) -> int | None:
        """Where `caption` stands among the sorted keys."""
        key = self._key(caption)
        head = np.uint64(int.from_bytes(key[:8], "big"))
        row = int(np.searchsorted(self._heads, head))
        while row < len(self._heads) and self._heads[row] == head:  # two keys that begin alike are rare, not excluded
            if self._keys[row].tobytes() == key:
                return row
            row += 1
        return None

    def _place(self, caption: str) -> tuple[int, int, int]:
        row = self._row(caption)
        if row is None:
            raise UserError(
                f"the caption {caption[:60]!r} is not in the text cache {self.folder}: run prepare again for this data"
            )
        shard, first, end = self._places[row].tolist()
        return shard, first, end


def valid_rows(hidden: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The valid tokens of each caption, fp16 (number, W) on the CPU."""
    for states, valid in zip(hidden.half().cpu(), mask.cpu(), strict=True):
        yield states[valid]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises UserError where it is damaged or another version's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = manifest["version"] == VERSION and {"fingerprint", "shards"} <= set(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{folder / MANIFEST} is no manifest of a text cache: delete the folder and run prepare again")
    return manifest


def read_shard(path: Path, size: int) -> dict[str, Tensor]:
    """`hidden` fp16 (T, W), memory-mapped, `ends` int64 (N,) and `keys` uint8 (N, 32)."""
    remedy = "delete the cache's folder and run prepare again"
    try:
        if path.stat().st_size != size:
            raise UserError(f"{path} has not the {size} bytes that were written: {remedy}")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ("hidden", "ends", "keys")}
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {remedy}") from error
