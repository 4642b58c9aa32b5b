"""Write the latents of a split: every image encoded plain and flipped, shard by shard, each shard whole or not there.

B batch, R resolution of the images, D latent channels, h w latent grid, n samples of a shard.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from fluxflow_train.data.latent_cache import SAMPLES_PER_SHARD, checked_manifest, identity
from fluxflow_train.data.loader import EvalLoader, check_damage
from fluxflow_train.data.lock import alone
from fluxflow_train.data.progress import progress
from fluxflow_train.data.reader import ImageReader, PlainView
from fluxflow_train.data.sampler import eval_batches
from fluxflow_train.data.selection import Selection
from fluxflow_train.data.writer import MANIFEST
from fluxflow_train.errors import UserError
from fluxflow_train.files import replacing, write_atomically
from fluxflow_train.pixels import dequantize

Posterior = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, R, R) in [-1, 1] to mean and logvar (B, D, h, w) of the standardised latent."""

BATCH = 32
BATCHES_PER_SHARD = SAMPLES_PER_SHARD // BATCH


def write_latents(
    folder: Path,
    selection: Selection,
    resolution: int,
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
    Several processes may do this at once: one works, the others wait for it.

    Raises:
        UserError: an image is damaged, a latent is not finite in 16 bits, the folder can't be written or holds others.
    """
    reader = ImageReader(selection, resolution, "exact", PlainView(), cache_bytes=0)
    expected = identity(vae_sha256, selection.fingerprint, resolution)
    if not (folder / MANIFEST).exists():
        try:
            with alone(folder), _exactly(device):
                if not (folder / MANIFEST).exists():
                    _write_shards(folder, reader, posterior, expected, device, num_workers, tolerant)
                    _write_manifest(folder, selection, expected)
        except OSError as error:
            raise UserError(f"can't write latents to {folder}: {error}; choose another data root") from error
    checked_manifest(folder, expected)


def _write_shards(
    folder: Path,
    reader: ImageReader,
    posterior: Posterior,
    expected: dict[str, Any],
    device: str,
    num_workers: int,
    tolerant: bool,
) -> None:
    """Make the shards that are not there, from one pass over their images."""
    selection = reader.selection
    batches = eval_batches(len(selection), BATCH, 0, 1)
    missing = {}
    for number, first in enumerate(range(0, len(batches), BATCHES_PER_SHARD)):
        if _note(_path(folder, number)).get("identity") != expected:
            missing[number] = batches[first : first + BATCHES_PER_SHARD]
    loader = EvalLoader(reader, [batch for shard in missing.values() for batch in shard], num_workers, tolerant)
    images = iter(progress(loader, f"Encoding latents of {folder.name}", len(loader)))
    for number, shard in missing.items():
        latents = torch.cat([_encode(batch, selection, posterior, device) for batch in islice(images, len(shard))])
        check_damage(selection, loader.damaged)
        # A stand-in's damage may lie in the next shard, which then tells of it itself.
        first, last = shard[0][0][1], shard[-1][-1][1]
        damaged = {sample: cause for sample, cause in loader.damaged.items() if first <= sample <= last}
        tensors = {"mean": latents[:, :, 0].contiguous(), "logvar": latents[:, :, 1].contiguous()}
        # One entry: safetensors writes several in an order that changes from call to call.
        metadata = {"note": json.dumps({"identity": expected, "damaged": damaged})}
        with replacing(_path(folder, number)) as temporary:
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


def _write_manifest(folder: Path, selection: Selection, expected: dict[str, Any]) -> None:
    """Last: who finds it finds the shards whole."""
    rows, shape = [], []
    for number in range(-(-len(selection) // SAMPLES_PER_SHARD)):
        path = _path(folder, number)
        data = path.read_bytes()
        shape = load(data)["mean"].shape
        rows.append(
            {
                "name": path.name,
                "samples": shape[0],
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "damaged": _note(path)["damaged"],
            }
        )
    manifest = {
        **expected,
        "decode": "exact",
        "count": len(selection),
        "shape": list(shape[2:]),
        "dtype": "float16",
        "views": ["plain", "flipped"],
        "source": _licence(Path(selection.index.shards[0]).parent),
        "shards": rows,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / MANIFEST, text.encode())


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
