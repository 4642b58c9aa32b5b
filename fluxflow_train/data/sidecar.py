"""Where the index of a shard is kept: columns and keys in one file, memory-mapped, next to the tar or in a cache.

N samples of the shard.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxflow_train.errors import UserError

VERSION = 2
COLUMNS = (
    "image_offset",
    "image_size",
    "caption_offset",
    "caption_size",
    "caption_is_json",  # 0 or 1
    "num_captions",  # usable ones; 0 = missing
    "width",  # after the EXIF rotation; 0 where `problem` is set
    "height",
    "problem",  # position in PROBLEMS
    "key_end",  # end of the key in the key bytes
)
PROBLEMS = ("", "no image", "empty image", "not an image", "too many pixels", "image file too large")

_MAGIC = b"fluxflow shard index\n"


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard. `columns` is int64 (len(COLUMNS), N), `keys` the UTF-8 keys end to end.

    `header` holds version, fingerprint, size and mtime_ns of the tar, and what was counted while reading it.
    """

    header: dict[str, Any]
    columns: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return self.columns.shape[1]

    def column(self, name: str) -> np.ndarray:
        """int64 (N,)."""
        return self.columns[COLUMNS.index(name)]

    def is_of(self, status: os.stat_result) -> bool:
        """Whether the tar that `status` describes is the one that this table was built from."""
        return (self.header["tar_bytes"], self.header["tar_mtime_ns"]) == (status.st_size, status.st_mtime_ns)

    def has_fields(self, fields: Sequence[str]) -> bool:
        """Whether captions were looked for in those fields."""
        return self.header["caption_fields"] == list(fields)

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        ends = self.column("key_end")
        start = int(ends[row - 1]) if row else 0
        return bytes(self.keys[start : int(ends[row])]).decode("utf-8", "surrogateescape")


def candidates(tar: str, cache: Path) -> list[Path]:
    """Where the index of the local `tar` may lie: next to it, else (a read-only folder) in `cache`."""
    path = Path(tar)
    return [path.with_name(path.name + ".index"), in_cache(str(path.absolute()), path.stem, cache)]


def in_cache(place: str, name: str, cache: Path) -> Path:
    """In `cache` under the hash of the shard's full path or address."""
    return cache / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.index"


def load(path: Path) -> ShardTable | None:
    """Memory-map an index file; None where there is none, or one that another version wrote or that was cut."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            header = json.loads(file.readline())
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return None
    count = header["count"]
    columns_bytes = 8 * len(COLUMNS) * count
    if header["version"] != VERSION or size != start + columns_bytes + header["key_bytes"]:
        return None
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    columns = data[start : start + columns_bytes].view(np.int64).reshape(len(COLUMNS), count)
    return ShardTable(header, columns, data[start + columns_bytes :])


def save(path: Path, table: ShardTable) -> None:
    """Write an index file under a temporary name and rename it. Raises OSError where the folder can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps(table.header, ensure_ascii=True).encode()
    padding = b" " * (-(len(_MAGIC) + len(header) + 1) % 8)  # int64 columns start at a multiple of 8
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + header + padding + b"\n" + table.columns.tobytes() + table.keys.tobytes())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out the other users of the data
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # there only where an error came


def save_first_possible(paths: list[Path], table: ShardTable) -> None:
    """Save to the first of `paths` whose folder takes it. Raises UserError where none does."""
    reasons = []
    for path in paths:
        try:
            save(path, table)
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
        else:
            return
    raise UserError(f"can't write the index ({'; '.join(reasons)}): set data.root to a folder with space")
