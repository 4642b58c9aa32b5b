"""Build the table of one shard: which members make a sample, and what their headers say."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluxflow_train.data import sidecar
from fluxflow_train.data.captions import FIELDS, MAX_BYTES, parse_captions
from fluxflow_train.data.images import EXTENSIONS, BadImage, image_size
from fluxflow_train.data.sidecar import PROBLEMS, ShardTable
from fluxflow_train.data.tar import Member, read_members
from fluxflow_train.errors import UserError

CAPTION_EXTENSIONS = ("txt", "json")

MAX_IMAGE_BYTES = 256 << 20  # of an image file: more is not read into memory

_HEAD_BYTES = 65_536  # enough to find the size of almost every image
_DOTTED_KEYS_NAMED = 5


@dataclass
class Members:
    """What makes one sample: its members by lower-case extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The extension of the image that is used."""
        return next((extension for extension in EXTENSIONS if extension in self.members), None)


def build_table(path: str, fields: Sequence[str] = FIELDS, shard: str = "", sha256: str = "") -> ShardTable:
    """Read the shard at `path` strictly: its tar table, the header of every image, every caption.

    `fields` of JSON members hold the captions. Of a copy, `shard` is the name of the original and `sha256` its content.

    Raises:
        UserError: the tar is damaged, a name or key comes twice, or the members of a sample don't lie together.
    """
    members = read_members(path)
    status = os.stat(path)
    samples, dotted = samples_of(path, members)
    if not samples:
        raise UserError(f"shard {path} holds no samples: expected files like 000.jpg and 000.txt")
    counts: Counter[str] = Counter()
    rows = []
    with open(path, "rb") as file:
        for sample in samples:
            row = _image_row(file.fileno(), sample, counts) | _caption_row(file.fileno(), sample, counts, fields)
            rows.append([row.get(name, 0) for name in sidecar.COLUMNS])
    columns = np.ascontiguousarray(np.array(rows, np.int64).T)
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    columns[sidecar.COLUMNS.index("key_end")] = np.cumsum([len(key) for key in keys])
    listing = [[member.name, member.offset, member.size] for member in members]
    identity: list[Any] = [shard or Path(path).name, status.st_size, listing]
    if tuple(fields) != FIELDS:
        identity.append(list(fields))
    header = {
        "version": sidecar.VERSION,
        "count": len(samples),
        "key_bytes": sum(len(key) for key in keys),
        "tar_bytes": status.st_size,
        "tar_mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
        "caption_fields": list(fields),
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "dotted_keys": dotted[:_DOTTED_KEYS_NAMED],
        "dotted_keys_count": len(dotted),
        "counts": dict(counts),
    }
    return ShardTable(header, columns, np.frombuffer(b"".join(keys), np.uint8))


def samples_of(path: str, members: list[Member]) -> tuple[list[Members], list[str]]:
    """The samples in order, and the keys that hold dots.

    WebDataset's rule is that the extension starts at the first dot of the file name. Where that leaves a run of
    members without an image, the dots belong to the keys (img.v1.2.jpg) and the last dot counts.
    """
    samples: list[Members] = []
    dotted: list[str] = []
    seen: set[str] = set()
    for run in _runs(members):
        extensions = {extension.lower() for _, extension, _ in run}
        in_key = not extensions & set(EXTENSIONS) and any(e.rpartition(".")[2] in EXTENSIONS for e in extensions)
        here: list[Members] = []
        for key, extension, member in run:
            if in_key:
                stem, _, extension = extension.rpartition(".")
                key = f"{key}.{stem}" if stem else key
            extension = extension.lower()
            if not here or here[-1].key != key:
                if key in seen:
                    raise UserError(
                        f"shard {path}, offset {member.header}: key {key} comes again after other samples;"
                        " the members of a sample must lie together, write the shard again sorted by name"
                    )
                seen.add(key)
                here.append(Members(key))
            if extension in here[-1].members:
                raise UserError(
                    f"shard {path}, offset {member.header}: {member.name} is there twice; write the shard again"
                )
            here[-1].members[extension] = member
        if in_key:
            dotted += [sample.key for sample in here]
        samples += here
    return samples, dotted


def _runs(members: list[Member]) -> list[list[tuple[str, str, Member]]]:
    """(key, extension, member) by WebDataset's rule, consecutive ones of a key together; hidden files left out."""
    runs: list[list[tuple[str, str, Member]]] = []
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        if not name or name.startswith("."):
            continue
        stem, _, extension = name.partition(".")
        key = folder + slash + stem
        if not runs or runs[-1][-1][0] != key:
            runs.append([])
        runs[-1].append((key, extension, member))
    return runs


def _image_row(descriptor: int, sample: Members, counts: Counter[str]) -> dict[str, int]:
    present = [sample.members[extension] for extension in EXTENSIONS if extension in sample.members]
    if not present:
        return {"problem": PROBLEMS.index("no image")}
    if len(present) > 1:
        counts["several images in a sample, first format used"] += 1
    beside = sum("." in extension and extension.rpartition(".")[2] in EXTENSIONS for extension in sample.members)
    if beside:  # img.seg.jpg beside img.jpg belongs to it, as WebDataset has it; or somebody's key has dots
        counts["images with dots in the extension, beside one without, not read"] += beside
    image = present[0]
    row = {"image_offset": image.offset, "image_size": image.size}
    if image.size > MAX_IMAGE_BYTES:
        return row | {"problem": PROBLEMS.index("image file too large")}
    try:
        width, height = _image_size(descriptor, image)
    except BadImage as error:
        return row | {"problem": PROBLEMS.index(str(error))}
    return row | {"width": width, "height": height}


def _image_size(descriptor: int, image: Member) -> tuple[int, int]:
    try:
        return image_size(os.pread(descriptor, min(image.size, _HEAD_BYTES), image.offset))
    except BadImage:
        if image.size <= _HEAD_BYTES:
            raise
    return image_size(os.pread(descriptor, image.size, image.offset))


def _caption_row(descriptor: int, sample: Members, counts: Counter[str], fields: Sequence[str]) -> dict[str, int]:
    for extension in CAPTION_EXTENSIONS:
        if extension not in sample.members:
            continue
        member = sample.members[extension]
        data = os.pread(descriptor, min(member.size, MAX_BYTES + 1), member.offset)
        captions, noted = parse_captions(data, extension, fields)
        counts.update(noted)
        if captions:
            return {
                "caption_offset": member.offset,
                "caption_size": member.size,
                "caption_is_json": int(extension == "json"),
                "num_captions": len(captions),
            }
    return {}
