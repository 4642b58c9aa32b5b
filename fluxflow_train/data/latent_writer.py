"""Write the latents of a split: every image encoded plain and flipped, shard by shard, each shard whole or not there.

B batch, H W pixels of its images, D latent channels, h w latent grid, n samples of a shard.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluxflow_train.data.buckets import Buckets
from fluxflow_train.data.latent_cache import SAMPLES_PER_SHARD, checked_manifest, identity
from fluxflow_train.data.loader import EvalLoader, check_damage
from fluxflow_train.data.lock import alone, claim, held
from fluxflow_train.data.progress import progress
from fluxflow_train.data.reader import ImageReader, PlainView
from fluxflow_train.data.selection import Selection
from fluxflow_train.data.writer import MANIFEST
from fluxflow_train.errors import UserError
from fluxflow_train.files import replacing, sha256_of, write_atomically
from fluxflow_train.pixels import dequantize

Posterior = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) in [-1, 1] to mean and logvar (B, D, h, w) of the standardised latent."""

BATCH = 32


def write_latents(
    folder: Path,
    selection: Selection,
    buckets: Buckets,
    posterior: Posterior,
    *,
    vae_sha256: str,
    device: str,
    num_workers: int,
    tolerant: bool,
) -> None:
    """Encode every sample of `selection`, decoded exactly, unless that was done; shards that are finished are kept.

    In fp32 and in batches of one size, so the result depends neither on the batch size of training nor on where an
    earlier call was broken off. `tolerant`: the next whole image stands in for a damaged one, instead of an error.
    Any number of processes on any number of machines may do this at once: each takes shards that no other has.

    Raises:
        UserError: an image is damaged, a latent is not finite in 16 bits, the folder can't be written or holds others.
    """
    reader = ImageReader(selection, buckets, "exact", PlainView(), cache_bytes=0)
    expected = identity(vae_sha256, selection.fingerprint, buckets.fingerprint)
    numbers = range(-(-len(selection) // SAMPLES_PER_SHARD))
    try:
        if not (folder / MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                with claim(_claim(folder, number)) as mine:
                    if mine:
                        _write_shard(folder, number, reader, posterior, expected, device, num_workers, tolerant)
            for number in numbers:  # what another process has, or had when it was killed
                with held(_claim(folder, number), f"encoding {_path(folder, number).name}"):
                    _write_shard(folder, number, reader, posterior, expected, device, num_workers, tolerant)
            with alone(folder):
                if not (folder / MANIFEST).exists():
                    _write_manifest(folder, reader, expected)
    except OSError as error:
        raise UserError(f"can't write latents to {folder}: {error}; choose another data root") from error
    checked_manifest(folder, expected)


def _write_shard(
    folder: Path,
    number: int,
    reader: ImageReader,
    posterior: Posterior,
    expected: dict[str, Any],
    device: str,
    num_workers: int,
    tolerant: bool,
) -> None:
    """Make one shard, unless it is there."""
    path = _path(folder, number)
    if (folder / MANIFEST).exists() or _note(path).get("identity") == expected:
        return
    selection, total = reader.selection, len(reader.selection)
    first, last = number * SAMPLES_PER_SHARD, min(total, (number + 1) * SAMPLES_PER_SHARD)
    of = reader.buckets.of[first:last]
    tensors = {"group": torch.empty(len(of), dtype=torch.int64), "row": torch.empty(len(of), dtype=torch.int64)}
    groups = [first + np.flatnonzero(of == bucket) for bucket in np.unique(of)]
    requests = [
        [(0, s) for s in group[i : i + BATCH].tolist()] for group in groups for i in range(0, len(group), BATCH)
    ]
    loader = EvalLoader(reader, requests, num_workers, tolerant)
    title = f"Encoding latents of {folder.name}, shard {number + 1} of {-(-total // SAMPLES_PER_SHARD)}"
    batches = iter(progress(loader, title, len(loader)))
    with _exactly(device):
        for at, group in enumerate(groups):
            mine = islice(batches, -(-len(group) // BATCH))
            latents = torch.cat([_encode(batch, selection, posterior, device) for batch in mine])
            tensors[f"mean.{at}"] = latents[:, :, 0].contiguous()
            tensors[f"logvar.{at}"] = latents[:, :, 1].contiguous()
            places = torch.from_numpy(group - first)
            tensors["group"][places] = at
            tensors["row"][places] = torch.arange(len(group))
    assert next(batches, None) is None  # the bar and the workers come to their end
    check_damage(selection, loader.damaged)
    # A stand-in's damage may lie in the next shard, which then tells of it itself.
    damaged = {sample: cause for sample, cause in loader.damaged.items() if first <= sample < last}
    # One entry: safetensors writes several in an order that changes from call to call.
    metadata = {"note": json.dumps({"identity": expected, "damaged": damaged})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


@contextmanager
def _exactly(device: str) -> Iterator[None]:
    """fp32 as such, the same each time, without gradients."""
    with (
        torch.no_grad(),  # not inference_mode: what a module keeps from its first call would refuse gradients for ever
        torch.autocast(torch.device(device).type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        yield


def _encode(batch: dict[str, Any], selection: Selection, posterior: Posterior, device: str) -> Tensor:
    """float16 (B, 2, 2, D, h, w) on the CPU: plain and flipped, mean and logvar."""
    count = len(batch["image"])
    image = batch["image"].to(device)
    image = torch.cat([image, image[-1:].expand(BATCH - count, -1, -1, -1)])
    views = [torch.stack(posterior(dequantize(view)), dim=1) for view in (image, image.flip(-1))]
    latents = torch.stack(views, dim=1)[:count].to("cpu", torch.float16)
    for sample, latent in zip(batch["index"].tolist(), latents, strict=True):
        if not latent.isfinite().all():
            raise UserError(
                f"{selection.name(sample)}: its latent is not finite in 16 bits (NaN, infinite or beyond 65504):"
                " the VAE diverged; choose another one"
            )
    return latents


def _write_manifest(folder: Path, reader: ImageReader, expected: dict[str, Any]) -> None:
    """Last: who finds it finds the shards whole."""
    selection, rows, damaged = reader.selection, [], {}
    for number in range(-(-len(selection) // SAMPLES_PER_SHARD)):
        path = _path(folder, number)
        digest = sha256_of(path)
        met = _note(path)["damaged"]
        damaged |= {int(sample): cause for sample, cause in met.items()}
        samples = min(SAMPLES_PER_SHARD, len(selection) - number * SAMPLES_PER_SHARD)
        rows.append(
            {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest, "damaged": met}
        )
    check_damage(selection, damaged)
    manifest = {
        **expected,
        "decode": "exact",
        "count": len(selection),
        "shapes": [list(shape) for shape in reader.buckets.shapes],
        "dtype": "float16",
        "views": ["plain", "flipped"],
        "source": _licence(Path(selection.index.shards[0]).parent),
        "shards": rows,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / MANIFEST, text.encode())
    for number in range(len(rows)):
        _claim(folder, number).unlink(missing_ok=True)


def _claim(folder: Path, number: int) -> Path:
    return folder / f".latents-{number:05d}.lock"


def _path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _note(path: Path) -> dict[str, Any]:
    """What a finished shard is of, and its damaged samples; nothing where there is none, or half of one."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["note"])
    except SafetensorError:
        return {}


def _licence(folder: Path) -> dict[str, str]:
    """The licence note of the images: latents decode to them. Nothing where the folder's manifest has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the user's own shards need no manifest, and theirs need not be like ours
        return {}
    return {name: manifest[name] for name in ("source", "licence", "attribution") if name in manifest}
