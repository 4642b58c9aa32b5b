"""What can be trusted in a damaged tar: every whole member, grouped to samples, and what had to be left out."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from fluxflow_train.data.images import BadImage, ImageLimits, decode_image
from fluxflow_train.data.table import MAX_IMAGE_BYTES, samples_of
from fluxflow_train.data.tar import UNREADABLE, Member, members_of
from fluxflow_train.data.writer import Sample
from fluxflow_train.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBER_BYTES = MAX_IMAGE_BYTES
_RESOLUTION = (64, 64)  # of the trial decoding; damage shows at any


def salvaged(path: str, limits: ImageLimits, dropped: Counter[str]) -> Iterator[Sample]:
    """The whole samples of the tar at `path`, one in memory at a time; `dropped` counts the rest by cause.

    Where the chain of headers is broken, it goes on at the next block that is a valid header. Members of a sample that
    lie apart are put together.

    Raises:
        UserError: the file can't be read, or holds nothing that can be trusted.
    """
    try:
        with open(path, "rb") as file:
            members = _unique(file, list(_members(file, dropped)), dropped)
            if not members:
                raise UserError(f"shard {path}: nothing in it can be saved")
            written: set[str] = set()
            for sample in samples_of(path, members)[0]:
                data: dict[str, bytes] = {}
                for extension, member in sample.members.items():
                    if member.size > _MAX_MEMBER_BYTES:
                        dropped["members over 256 MiB"] += 1
                    else:
                        data[extension] = os.pread(file.fileno(), member.size, member.offset)
                image = sample.image
                if image is None or image not in data:
                    dropped["samples without an image"] += 1
                    continue
                try:
                    decode_image(data[image], _RESOLUTION, "exact", limits)
                except BadImage as error:
                    dropped[f"samples with: {error}"] += 1
                    continue
                key = _relative(sample.key, dropped)
                if key in written:
                    dropped["samples whose name, made relative, is another's"] += 1
                    continue
                written.add(key)
                yield Sample(key, data)
    except OSError as error:
        raise UserError(f"can't read shard {path}: {error.strerror or error}") from error


def _members(file: BinaryIO, dropped: Counter[str]) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    position, lost = 0, False
    while position + _BLOCK <= size:
        block = os.pread(file.fileno(), _BLOCK, position)
        # After a break only a header with its mark is believed; the check of its sum comes with tarfile's reading.
        if not block.strip(b"\0") or (lost and block[257:262] != b"ustar"):
            position += _BLOCK
            continue
        stop = position
        for member, end in _chain(file, position, size, dropped):
            stop = end
            if member is not None:
                yield member
        if stop > position:
            position, lost = stop, False
            continue
        if not lost:
            dropped["places where the tar is broken"] += 1
        position, lost = position + _BLOCK, True


def _chain(file: BinaryIO, first: int, size: int, dropped: Counter[str]) -> Iterator[tuple[Member | None, int]]:
    """The members from `first` on as far as header leads to header, each with the position behind it."""
    file.seek(first)
    try:
        tar = members_of(file)
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
            if info.size < 0 or info.offset_data + info.size > size:
                dropped["members that are cut short"] += 1
                return
            if info.isreg() and not info.issparse():
                yield Member(info.name, info.offset, info.offset_data, info.size), end
            else:
                dropped["links and special files"] += not info.isdir()
                yield None, max(tar.offset, info.offset + _BLOCK)
    except UNREADABLE:
        return


def _unique(file: BinaryIO, members: list[Member], dropped: Counter[str]) -> list[Member]:
    """Each name once, the members of a key together; keys in the order in which they first come."""
    by_name: dict[str, Member] = {}
    for member in members:
        suffix = PurePosixPath(member.name).suffix
        name = member.name.removesuffix(suffix) + suffix.lower()  # extensions are read so
        first = by_name.setdefault(name, member)
        if first is member:
            continue
        same = first.size == member.size and _same(file, first, member)
        dropped["members that come again, identical" if same else "members that come again, different"] += 1
    groups: dict[str, list[Member]] = {}
    for name, member in by_name.items():
        folder, slash, base = name.rpartition("/")
        groups.setdefault(folder + slash + base.partition(".")[0], []).append(member)
    # Where dots belong to the keys, a group holds several samples, and the members of each lie together.
    return [
        member
        for group in groups.values()
        for member in sorted(group, key=lambda member: (member.name.rpartition(".")[0], member.name))
    ]


def _same(file: BinaryIO, one: Member, other: Member) -> bool:
    step = 1 << 20
    for at in range(0, one.size, step):
        count = min(step, one.size - at)
        if os.pread(file.fileno(), count, one.offset + at) != os.pread(file.fileno(), count, other.offset + at):
            return False
    return True


def _relative(key: str, dropped: Counter[str]) -> str:
    """`key` as a name that stays inside the folder where a tar is unpacked."""
    parts = [part for part in PurePosixPath(key).parts if part not in ("/", "..")]
    safe = "/".join(parts)
    dropped["names that led outside, made relative"] += safe != key
    return safe
