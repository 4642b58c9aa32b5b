"""Read the table of a tar strictly: everything in it is found, or the damage is named with its place."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fluxflow_train.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
# What tarfile raises at headers that make no sense, or at thousands of long names in a row: not all of it is its own.
UNREADABLE = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)
_MAX_HEADER = 1 << 20  # bytes of a long name or of a PAX header: tarfile reads them as a whole


@dataclass(frozen=True)
class Member:
    """One file of a tar: where its header starts, where its `size` bytes of data lie."""

    name: str
    header: int
    offset: int
    size: int


class Headers:
    """A tar as tarfile is to see it: of what lies between the headers it reads a little at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def members_of(file: BinaryIO) -> tarfile.TarFile:
    """The tar from where `file` stands; tarfile's errors are all in UNREADABLE."""
    return tarfile.TarFile(fileobj=Headers(file), mode="r", errorlevel=2)  # type: ignore[arg-type]


def read_members(path: str) -> list[Member]:
    """Every regular file of the plain tar at `path`, in order.

    Raises:
        UserError: the file is missing or not a plain, whole tar; the message names the shard and the offset.
    """
    check_local(path)
    try:
        with open(path, "rb") as file:
            _check_kind(path, file)
            return list(_members(path, file))
    except OSError as error:
        raise UserError(f"can't read shard {path}: {error.strerror or error}") from error


def check_local(path: str) -> None:
    """Raises UserError unless `path` names a file of this machine."""
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist or is not a file: check the paths in data")


def _check_kind(path: str, file: BinaryIO) -> None:
    head = file.read(_BLOCK)
    if not head:
        raise UserError(f"shard {path} is empty (0 bytes): copy or download it again")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"shard {path} is gzip-compressed: unpack it (gunzip), or let its name end in .gz")
    if head.lstrip().startswith(b"<"):
        raise UserError(f"shard {path} is a web page, not a tar: its download failed, repeat it")


def _members(path: str, file: BinaryIO) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        tar = members_of(file)
    except UNREADABLE as error:
        raise UserError(f"shard {path} is not a tar (damaged header at offset 0): {error}; copy it again") from error
    while True:
        offset = tar.offset
        try:
            info = tar.next()
        except tarfile.ReadError as error:
            raise _damaged(path, offset, "the file is cut short or a header damaged") from error
        except UNREADABLE as error:
            raise _damaged(path, offset, "damaged header") from error
        if info is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  (a million of them would take 1 GB)
        if info.size < 0:
            raise _damaged(path, info.offset, "damaged header")
        if info.offset_data + info.size > size:
            raise _damaged(path, info.offset, f"{info.name} is cut short")
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise _damaged(path, info.offset, f"{info.name} is a link or special file")
        yield Member(info.name, info.offset, info.offset_data, info.size)
    _check_end(path, file, tar.offset)


def _check_end(path: str, file: BinaryIO, end: int) -> None:
    """tarfile stops without a word at a header that it can't read; only zeros may follow where it stopped."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _damaged(path, end, "the file is cut short, its end mark is missing")
    if block.strip(b"\0"):
        raise _damaged(path, end, "damaged header")
    position = end + _BLOCK
    while chunk := file.read(1 << 20):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += len(chunk) - len(rest)
            raise _damaged(path, position, "more data behind the end mark (two tars concatenated?)")
        position += len(chunk)


def _damaged(path: str, offset: int, what: str) -> UserError:
    return UserError(f"shard {path}, offset {offset}: {what}; copy or write the shard again")
