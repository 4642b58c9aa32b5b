"""The strict index over plain tars: every sample addressable by number, read with `pread`.

N samples in all shards together.
"""

import bisect
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from fluxflow_train.data import sidecar
from fluxflow_train.data.captions import parse_captions
from fluxflow_train.data.sidecar import ShardTable
from fluxflow_train.data.table import build_table
from fluxflow_train.data.tar import check_local
from fluxflow_train.errors import UserError

_MAX_OPEN_FILES = 128  # per process; a system's usual limit is 1024


def open_table(path: str, cache: Path) -> ShardTable:
    """The table of the shard at `path`: the stored one if it is of this very file, else built and stored now.

    Several processes may do this at once: each writes the same bytes and renames.
    """
    check_local(path)
    status = os.stat(path)
    places = sidecar.candidates(path, cache)
    for place in places:
        table = sidecar.load(place)
        if table is not None and table.is_of(status):
            return table
    table = build_table(path)
    sidecar.save_first_possible(places, table)
    return table


class Index:
    """Samples 0 to N - 1 of `shards`, in order. Files are opened when first read, by the process that reads."""

    def __init__(self, shards: list[str], cache: Path) -> None:
        self._descriptors: dict[int, int] = {}  # first: __del__ needs it also where the rest fails
        if not shards:
            raise ValueError("shards: got an empty list, expected at least one path")
        self.shards = shards
        self._cache = cache
        self._tables = [open_table(path, cache) for path in shards]
        self._starts = [0, *np.cumsum(self.sizes).tolist()]

    def __reduce__(self) -> tuple[type["Index"], tuple[list[str], Path]]:
        """A spawned worker opens the index anew rather than receive a copy of it."""
        return Index, (self.shards, self._cache)

    def __len__(self) -> int:
        return self._starts[-1]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard."""
        return [len(table) for table in self._tables]

    @property
    def fingerprint(self) -> str:
        """Hash of the names, sizes and member tables of all shards in order; not of their paths or times."""
        return hashlib.sha256("".join(table.header["fingerprint"] for table in self._tables).encode()).hexdigest()

    @property
    def counts(self) -> Counter[str]:
        """What was met and dealt with while the table was built, by cause."""
        return sum((Counter(table.header["counts"]) for table in self._tables), Counter())

    @property
    def dotted_keys(self) -> list[str]:
        """Some of the keys that hold dots, which WebDataset's own reader takes for extensions."""
        return [key for table in self._tables for key in table.header["dotted_keys"]]

    def column(self, name: str) -> np.ndarray:
        """int64 (N,), copied into memory."""
        return np.concatenate([table.column(name) for table in self._tables])

    def place(self, sample: int) -> tuple[int, int]:
        """(shard, row in it) of sample `sample`."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample: got {sample}, expected 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def key(self, sample: int) -> str:
        """The sample's key in its shard."""
        shard, row = self.place(sample)
        return self._tables[shard].key(row)

    def image(self, sample: int) -> bytes:
        """The encoded image."""
        shard, row = self.place(sample)
        table = self._tables[shard]
        return self._read(shard, int(table.column("image_offset")[row]), int(table.column("image_size")[row]))

    def captions(self, sample: int) -> list[str]:
        """All usable captions in their order; empty where there are none."""
        shard, row = self.place(sample)
        table = self._tables[shard]
        if not table.column("num_captions")[row]:
            return []
        data = self._read(shard, int(table.column("caption_offset")[row]), int(table.column("caption_size")[row]))
        return parse_captions(data, "json" if table.column("caption_is_json")[row] else "txt")[0]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
        data = os.pread(self._descriptors[shard], size, offset)
        if len(data) != size:
            raise UserError(
                f"shard {self.shards[shard]}, offset {offset}: cut short since it was indexed; copy it again"
            )
        return data
