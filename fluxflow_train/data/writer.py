"""Write WebDataset shards once: same samples, same bytes; readers see the whole folder or none of it."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxflow_train.data.lock import alone
from fluxflow_train.data.sources import SPLITS, Split
from fluxflow_train.errors import UserError
from fluxflow_train.files import sha256_of

MANIFEST = "manifest.json"
SAMPLES_PER_SHARD = 500


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: `members` maps an extension without its dot to the bytes of that member."""

    key: str
    members: dict[str, bytes]


def write_shard(path: Path, samples: Iterable[Sample], format: int = tarfile.USTAR_FORMAT) -> None:
    """Write one tar whose bytes depend on the samples alone (TarInfo's mtime, uid and gid are 0)."""
    with tarfile.open(path, "w", format=format) as tar:
        for sample in samples:
            for extension, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_splits(folder: Path, splits: dict[Split, list[Sample]]) -> list[dict[str, Any]]:
    """Write each split as `<split>-00000.tar` and so on; returns one manifest row per shard."""
    rows: list[dict[str, Any]] = []
    for split, samples in splits.items():
        for number, start in enumerate(range(0, len(samples), SAMPLES_PER_SHARD)):
            part = samples[start : start + SAMPLES_PER_SHARD]
            path = folder / f"{split}-{number:05d}.tar"
            write_shard(path, part)
            size, digest = path.stat().st_size, sha256_of(path)
            rows.append({"name": path.name, "split": split, "samples": len(part), "bytes": size, "sha256": digest})
    return rows


def publish(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Make `folder` by calling `write(temporary folder) -> manifest` and renaming, unless it is there already.

    Of several processes one works and the others wait for it; what a killed one left is cleared away by the next.

    Raises:
        UserError: the parent folder can't be written to.
    """
    if (folder / MANIFEST).exists():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with alone(temporary) as lock:
            try:
                if (folder / MANIFEST).exists():
                    return
                for leftover in temporary.iterdir():
                    if leftover != lock:
                        leftover.unlink()
                manifest = write(temporary)
                text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
                (temporary / MANIFEST).write_text(text, encoding="utf-8")
                lock.unlink()
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"can't write shards to {folder.parent}: {error}; choose another data root") from error


def published_shards(folder: Path, split: Split) -> list[str]:
    """The shards of `split` that the manifest of a published folder names, in its order.

    Raises:
        UserError: the folder was never prepared, or a shard has gone or changed size.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise UserError(f"{folder} has no {MANIFEST}: prepare the data first (python -m fluxflow_train.prepare)")
    rows = [row for row in json.loads(manifest.read_text(encoding="utf-8"))["shards"] if row["split"] == split]
    for row in rows:
        path = folder / row["name"]
        if not path.exists() or path.stat().st_size != row["bytes"]:
            raise UserError(f"{path} is missing or not as its manifest says: delete the folder to have it made anew")
    return [str(folder / row["name"]) for row in rows]
