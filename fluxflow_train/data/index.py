"""The strict index over plain tars: every sample addressable by number, read with `pread`.

N samples in all shards together.
"""

import bisect
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluxflow_train.data import sidecar
from fluxflow_train.data.captions import FIELDS, parse_captions
from fluxflow_train.data.download import shown
from fluxflow_train.data.progress import progress
from fluxflow_train.data.shard_cache import NoSpace, ShardCache, is_plain
from fluxflow_train.data.sidecar import ShardTable
from fluxflow_train.data.table import build_table
from fluxflow_train.data.tar import check_local
from fluxflow_train.errors import UserError
from fluxflow_train.files import sha256_of

_MAX_OPEN_FILES = 128  # per process; a system's usual limit is 1024
_MAX_OPEN_TABLES = 1024  # per process; a system's usual limit of mapped files is 65,530
_WORTH_PROCESSES = 4  # shards to index; starting processes takes as long
_DOTTED_KEYS_NAMED = 5
_IN_MEMORY = ("problem", "width", "height", "num_captions")  # what samples are selected by


def open_table(shard: str, cache: Path, fields: Sequence[str] = FIELDS, remote: ShardCache | None = None) -> ShardTable:
    """The table of `shard`: the stored one if it is of this very file, else built and stored now.

    A shard that is not a plain local file is fetched for that by `remote`, once. Several processes may do this at once:
    each writes the same bytes and renames.
    """
    stored = stored_table(shard, cache, fields)
    if stored is not None:
        return stored
    if is_plain(shard):
        table = build_table(shard, fields)
        sidecar.save_first_possible(sidecar.candidates(shard, cache), table)
        return table
    remote = remote or ShardCache(cache / "remote")
    copy = remote.fetch(shard)
    try:
        table = build_table(str(copy), fields, shown(shard), sha256_of(copy))
    except (UserError, FileNotFoundError) as error:
        if not copy.exists():
            raise NoSpace(f"{shown(shard)} had to go while it was read: raise data.remote_cache_bytes") from error
        raise UserError(str(error).replace(str(copy), shown(shard))) from error
    sidecar.save_first_possible([_remote_place(shard, cache)], table)
    return table


def stored_table(shard: str, cache: Path, fields: Sequence[str]) -> ShardTable | None:
    """The table of `shard` where one is stored and still of it."""
    if not is_plain(shard):
        table = sidecar.load(_remote_place(shard, cache))
        return table if table is not None and table.has_fields(fields) else None
    check_local(shard)
    status = os.stat(shard)
    for place in sidecar.candidates(shard, cache):
        table = sidecar.load(place)
        if table is not None and table.is_of(status) and table.has_fields(fields):
            return table
    return None


def open_tables(shards: Sequence[str], cache: Path, fields: Sequence[str], remote: ShardCache) -> None:
    """Build and store what is missing of the tables of `shards`, in several processes where that is worth it.

    Raises:
        UserError: shards are damaged or missing; all are looked at first, and listed where they are several.
    """
    errors: dict[str, UserError] = {}
    missing = []
    for shard in dict.fromkeys(shards):
        try:
            if stored_table(shard, cache, fields) is None:
                missing.append(shard)
        except UserError as error:
            errors[shard] = error
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    if processes == 1 or len(missing) < _WORTH_PROCESSES:
        for shard in progress(missing, "Indexing shards", len(missing)):
            if error := _error_of(shard, cache, fields, remote):
                errors[shard] = error
    else:
        # Forked ones share this process's memory; as in loading, none of them touches a device.
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = {pool.submit(_error_of, shard, cache, fields, remote): shard for shard in missing}
            try:
                for future in progress(as_completed(futures), "Indexing shards", len(missing)):
                    if error := future.result():
                        errors[futures[future]] = error
            except BrokenProcessPool as error:
                raise UserError("a process that read shards died: is the machine short of memory?") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    for shard in [shard for shard, error in errors.items() if isinstance(error, NoSpace)]:
        del errors[shard]  # alone it has all the space
        if error := _error_of(shard, cache, fields, remote):
            errors[shard] = error
    if not errors:
        return
    first = next(shard for shard in shards if shard in errors)
    if len(errors) == 1:
        raise errors[first]
    table = Table("shard", "what is wrong")
    for shard in dict.fromkeys(shards):
        if shard in errors:
            table.add_row(escape(shown(shard)), escape(str(errors[shard])))
    Console(stderr=True).print(table)
    raise UserError(
        f"{len(errors)} of {len(set(shards))} shards can't be read, first {errors[first]} (scripts/check_shards.py"
        " --repair DIR writes what is sound of them elsewhere)"
    )


def _error_of(shard: str, cache: Path, fields: Sequence[str], remote: ShardCache) -> UserError | None:
    try:
        open_table(shard, cache, fields, remote)
    except UserError as error:
        return error
    return None


def _remote_place(shard: str, cache: Path) -> Path:
    return sidecar.in_cache(shard, Path(urlsplit(shard).path).stem.lstrip(".")[:80] or "shard", cache)


class Index:
    """Samples 0 to N - 1 of `shards`, in order. Files are opened when first read, by the process that reads."""

    def __init__(
        self, shards: list[str], cache: Path, fields: Sequence[str] = FIELDS, remote: ShardCache | None = None
    ) -> None:
        """`cache` takes tables of shards whose folder is read-only, and without `remote` copies of remote shards."""
        self._descriptors: dict[int, int] = {}  # first: __del__ needs it also where the rest fails
        if not shards:
            raise ValueError("shards: got an empty list, expected at least one path")
        self.shards = shards
        self._cache = cache
        self._fields = tuple(fields)
        self._remote = remote or ShardCache(cache / "remote")
        self._tables: dict[int, ShardTable] = {}
        self.sizes: list[int] = []
        self.shard_bytes: list[int] = []
        self.counts: Counter[str] = Counter()
        self.dotted_keys: list[str] = []
        digest = hashlib.sha256()
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _IN_MEMORY}
        for number in range(len(shards)):
            table = self._table(number)
            self.sizes.append(len(table))
            self.shard_bytes.append(table.header["tar_bytes"])
            self.counts.update(table.header["counts"])
            self.dotted_keys += table.header["dotted_keys"][: _DOTTED_KEYS_NAMED - len(self.dotted_keys)]
            digest.update(table.header["fingerprint"].encode())
            for name, parts in columns.items():
                parts.append(table.column(name).astype(np.int32))
        self.fingerprint = digest.hexdigest()
        self._columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        self._starts = [0, *np.cumsum(self.sizes).tolist()]

    def __reduce__(self) -> tuple[type["Index"], tuple[object, ...]]:
        """A spawned worker opens the index anew rather than receive a copy of it."""
        return Index, (self.shards, self._cache, self._fields, self._remote)

    def __len__(self) -> int:
        return self._starts[-1]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def column(self, name: str) -> np.ndarray:
        """int64 (N,) of "problem", "width", "height" or "num_captions"."""
        return self._columns[name].astype(np.int64)

    def place(self, sample: int) -> tuple[int, int]:
        """(shard, row in it) of sample `sample`."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample: got {sample}, expected 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def key(self, sample: int) -> str:
        """The sample's key in its shard."""
        shard, row = self.place(sample)
        return self._table(shard).key(row)

    def image(self, sample: int) -> bytes:
        """The encoded image."""
        shard, row = self.place(sample)
        table = self._table(shard)
        return self._read(shard, int(table.column("image_offset")[row]), int(table.column("image_size")[row]))

    def captions(self, sample: int) -> list[str]:
        """All usable captions in their order; empty where there are none."""
        shard, row = self.place(sample)
        table = self._table(shard)
        if not table.column("num_captions")[row]:
            return []
        data = self._read(shard, int(table.column("caption_offset")[row]), int(table.column("caption_size")[row]))
        return parse_captions(data, "json" if table.column("caption_is_json")[row] else "txt", self._fields)[0]

    @property
    def remote_bytes(self) -> list[int]:
        """Sizes of the shards that are read through copies."""
        return [size for shard, size in zip(self.shards, self.shard_bytes, strict=True) if not is_plain(shard)]

    def _table(self, shard: int) -> ShardTable:
        if shard not in self._tables:
            if len(self._tables) >= _MAX_OPEN_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[shard] = open_table(self.shards[shard], self._cache, self._fields, self._remote)
        return self._tables[shard]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.shards[shard]
        if is_plain(path):
            data = os.pread(self._descriptor(shard), size, offset)
        else:
            data = self._remote.read(path, offset, size, self._table(shard).header["sha256"])
        if len(data) != size:
            raise UserError(f"shard {shown(path)}, offset {offset}: cut short since it was indexed; copy it again")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._descriptors[shard]
