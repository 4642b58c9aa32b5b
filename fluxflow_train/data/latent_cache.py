"""Latents computed once: the posterior of every sample of a split, plain and flipped, in 16-bit safetensors shards.

A shard holds the latents of each shape apart: `mean.<g>` and `logvar.<g>` are float16 (n_g, 2, D, h, w), each sample
as it is and then flipped left to right *before* it was encoded, since the flipped latent is not the latent of the
flipped image. `group` and `row` int64 (n,) say where each sample is.

D latent channels, h w latent grid, n samples of a shard, n_g of them of the g-th shape in it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fluxflow_train.data.writer import MANIFEST
from fluxflow_train.errors import UserError

VERSION = 2
SAMPLES_PER_SHARD = 1024

_REMEDY = "delete the folder to have it made anew"
_MEANING = {
    "version": "written in another format",
    "vae_sha256": "of another VAE",
    "fingerprint": "of other images",
    "buckets": "of other shapes",
}


class Latent(NamedTuple):
    """z = mean + exp(logvar / 2) * eps of one sample; each float32 (D, h, w)."""

    mean: Tensor
    logvar: Tensor


def identity(vae_sha256: str, fingerprint: str, buckets: str) -> dict[str, Any]:
    """What the latents of a folder depend on, by name: images are always decoded exactly, cut at the centre."""
    return {"version": VERSION, "vae_sha256": vae_sha256, "fingerprint": fingerprint, "buckets": buckets}


def latent_folder(root: Path, vae_sha256: str, fingerprints: Iterable[str]) -> Path:
    """Named after what decides the content, so that latents of another VAE or of other images never lie there."""
    content = json.dumps([VERSION, vae_sha256, *fingerprints])
    return root / f"latents-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def checked_manifest(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a finished folder whose identity is `expected` and whose shards have their sizes.

    Raises:
        UserError: the folder was never finished, holds latents of something else, or a shard is not as written.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no finished latents: prepare them first (python -m fluxflow_train.prepare)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {_REMEDY}") from error
    for name, value in expected.items():
        if manifest[name] != value:
            raise UserError(
                f"{folder}: these latents are {_MEANING[name]} ({name} is {manifest[name]}, expected {value}):"
                f" choose another folder, or {_REMEDY}"
            )
    for row in manifest["shards"]:
        shard = folder / row["name"]
        if not shard.exists() or shard.stat().st_size != row["bytes"]:
            raise UserError(f"{shard} is missing or not as its manifest says: {_REMEDY}")
    return manifest


class LatentCache:
    """The latents that `write_latents` left in a folder.

    Kept in memory, and checked against their hashes, where all together fit `cache_bytes`; else a shard is mapped when
    it is first read, by the process that reads.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], cache_bytes: int) -> None:
        self._folder, self._manifest, self._cache_bytes = folder, manifest, cache_bytes
        self._count: int = manifest["count"]
        rows = manifest["shards"]
        fits = sum(row["bytes"] for row in rows) <= cache_bytes
        self._shards: list[dict[str, Tensor] | None] = [self._loaded(row) if fits else None for row in rows]
        self.vae_sha256: str = manifest["vae_sha256"]
        self.damaged = {int(sample): cause for row in rows for sample, cause in row["damaged"].items()}

    @classmethod
    def open(cls, folder: Path, *, vae_sha256: str, fingerprint: str, buckets: str, cache_bytes: int) -> "LatentCache":
        """Latents by the VAE of that hash, of the selection and in the buckets of those fingerprints.

        Raises:
            UserError: the folder was never finished, holds latents of something else, or a shard is not as written.
        """
        manifest = checked_manifest(folder, identity(vae_sha256, fingerprint, buckets))
        return cls(folder, manifest, cache_bytes)

    def __reduce__(self) -> tuple[type["LatentCache"], tuple[Path, dict[str, Any], int]]:
        """A spawned worker opens the shards anew rather than receive a copy of them."""
        return LatentCache, (self._folder, self._manifest, self._cache_bytes)

    def __len__(self) -> int:
        return self._count

    def read(self, sample: int, flipped: bool) -> Latent:
        """The latent of one sample, or of its mirror image; of its stand-in where it is in `damaged`."""
        if not 0 <= sample < self._count:
            raise IndexError(f"sample: got {sample}, expected 0 to {self._count - 1}")
        number, at = divmod(sample, SAMPLES_PER_SHARD)
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = self._mapped(self._manifest["shards"][number])
        group, row, view = int(shard["group"][at]), int(shard["row"][at]), int(flipped)
        return Latent(shard[f"mean.{group}"][row, view].float(), shard[f"logvar.{group}"][row, view].float())

    def _loaded(self, row: dict[str, Any]) -> dict[str, Tensor]:
        path = self._folder / row["name"]
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise UserError(f"{path} was altered since it was written: {_REMEDY}")
        return load(data)

    def _mapped(self, row: dict[str, Any]) -> dict[str, Tensor]:
        path = self._folder / row["name"]
        try:
            with safe_open(path, "pt") as file:  # its tensors are views of the mapped file
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise UserError(f"{path} was altered since it was written ({error}): {_REMEDY}") from error
