"""Shards that are not plain local files, brought here when they are read, in a folder of bounded size."""

import hashlib
import json
import os
import re
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from fluxflow_train.data.download import CHUNK, Patience, Refused, download, shown
from fluxflow_train.data.lock import held
from fluxflow_train.data.writer import MANIFEST
from fluxflow_train.errors import UserError
from fluxflow_train.files import sha256_of

_GZIP = b"\x1f\x8b"
_MAX_MANIFEST = 64 << 20
_STAMP_EVERY = 1.0  # seconds between two notes of a shard's use


def is_plain(shard: str) -> bool:
    """Whether `shard` is read where it is."""
    return "://" not in shard and not shard.startswith("pipe:") and not shard.endswith((".gz", ".tgz"))


class NoSpace(UserError):
    """What several processes read at once doesn't fit the cache; what one of them reads may."""


@dataclass
class ShardCache:
    """Copies of remote shards, unpacked, in `folder`; all together never more than `max_bytes`.

    Any number of processes share it: one fetches a shard and the others wait, and where space is wanted the shard that
    was used longest ago goes. Where a `manifest.json` lies beside a shard and names it, its sha256 is compared.
    """

    folder: Path
    max_bytes: int = 20 * 2**30
    patience: Patience = field(default_factory=Patience)
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        self._manifests: dict[str, dict[str, str]] = {}
        self._stamped: dict[Path, float] = {}

    def read(self, shard: str, offset: int, size: int, sha256: str) -> bytes:
        """Bytes of the unpacked `shard`, whose content must be `sha256`; fewer where it ends before."""
        while True:
            path = self.fetch(shard, sha256)
            try:
                with path.open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:  # another process wanted the space just now
                continue

    def fetch(self, shard: str, sha256: str | None = None) -> Path:
        """The copy of `shard`, made if it is not here.

        Raises:
            UserError: it can't be had, it is not what its manifest or `sha256` says, or it doesn't fit `max_bytes`.
        """
        path = self.folder / self._name(shard)
        if path.exists():
            self._stamp(path)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with held(self.folder / f".{path.name}.lock", f"fetching {shown(shard)}"):
            if not path.exists():
                part = self.folder / f".{path.name}.part"
                try:
                    self._fetch(shard, part, sha256)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
                    part.with_suffix(".tar").unlink(missing_ok=True)
        return path

    def _fetch(self, shard: str, part: Path, sha256: str | None) -> None:
        for last in (False, True):
            download(shard, part, self._room, self.patience, self.allow_pipe)
            found, published = sha256_of(part), self._published(shard)
            if published in (None, found):
                break
            if last:
                raise UserError(
                    f"{shown(shard)} does not match its manifest: sha256 is {found[:16]}..., expected"
                    f" {published[:16]}...; it was damaged or changed where it is published"
                )
        with part.open("rb") as file:
            packed = file.read(2) == _GZIP
        if packed:
            self._unpack(shard, part)
            found = sha256_of(part)
        if sha256 not in (None, found):
            raise UserError(
                f"{shown(shard)} has changed since it was indexed: delete its index in {self.folder.parent} to train on"
                " what is there now, as a new run"
            )

    def _unpack(self, shard: str, part: Path) -> None:
        whole = part.with_suffix(".tar")
        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            with part.open("rb") as source, whole.open("wb") as out:
                data = source.read(CHUNK)
                while data:
                    piece = stream.decompress(data, CHUNK)
                    self._room(len(piece))
                    out.write(piece)
                    data = stream.unconsumed_tail
                    if stream.eof and stream.unused_data:  # gzip files may be laid end to end
                        data, stream = stream.unused_data, zlib.decompressobj(16 + zlib.MAX_WBITS)
                    if not data:
                        data = source.read(CHUNK)
        except zlib.error as error:
            raise UserError(f"{shown(shard)}: its gzip compression is damaged ({error}); publish it again") from error
        if not stream.eof:
            raise UserError(f"{shown(shard)}: its gzip compression is cut short; publish it again")
        os.replace(whole, part)

    def _room(self, wanted: int) -> None:
        """Make space for `wanted` more bytes."""
        with held(self.folder / ".room"):
            files = _sizes(self.folder)
            total = sum(size for _, _, size in files) + wanted
            for _, path, size in files:
                if total <= self.max_bytes:
                    break
                if not path.name.startswith("."):  # whole, so nobody is writing it
                    path.unlink(missing_ok=True)
                    total -= size
        if total > self.max_bytes:
            raise NoSpace(
                f"the shards that are read at once need more than data.remote_cache_bytes = {self.max_bytes:,} bytes in"
                f" {self.folder}: raise it, or lower data.window_shards"
            )

    def _published(self, shard: str) -> str | None:
        """The sha256 of `shard` by the manifest beside it, if there is one."""
        if shard.startswith("pipe:"):
            return None
        parts = urlsplit(shard)
        folder, _, name = parts.path.rpartition("/")
        url = urlunsplit(parts._replace(path=f"{folder}/{MANIFEST}")) if parts.scheme else f"{folder or '.'}/{MANIFEST}"
        if url not in self._manifests:
            self._manifests[url] = self._manifest(url)
        return self._manifests[url].get(name)

    def _manifest(self, url: str) -> dict[str, str]:
        part = self.folder / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.getpid()}.manifest"

        def room(wanted: int) -> None:
            if part.stat().st_size + wanted > _MAX_MANIFEST:
                raise Refused(f"{shown(url)} is too large for a manifest")

        try:
            download(url, part, room, self.patience)
            rows = json.loads(part.read_bytes())["shards"]
            return {str(row["name"]): str(row["sha256"]) for row in rows}
        except Refused:
            return {}  # most sets of shards have none
        except UserError:  # a server that fails must not do away with the comparison
            raise
        except (ValueError, KeyError, TypeError):
            return {}  # another program's
        finally:
            part.unlink(missing_ok=True)

    def _stamp(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._stamped.get(path, -_STAMP_EVERY) >= _STAMP_EVERY:
            self._stamped[path] = now
            try:
                os.utime(path)
            except FileNotFoundError:
                return

    def _name(self, shard: str) -> str:
        base = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(shard).path.rpartition("/")[2])[-80:].lstrip(".")
        return f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{base or 'shard'}"


def _sizes(folder: Path) -> list[tuple[float, Path, int]]:
    """Time of last use, path and bytes of the files in `folder`, the longest unused first."""
    found = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another process has just finished with it
            continue
        found.append((status.st_mtime, path, status.st_size))
    return sorted(found)
