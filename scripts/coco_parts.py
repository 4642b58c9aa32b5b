"""A shard of COCO images: read, looked at, written with its record, so that a killed run goes on behind it."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from struct import error as StructError
from typing import Any, NamedTuple

import numpy as np
from coco_annotations import Entry, Mark, digest
from PIL import Image

from fluxflow_train.data.images import BadImage, ImageLimits, decode_image
from fluxflow_train.data.writer import Sample, write_shard
from fluxflow_train.files import replacing, write_atomically

RECORDS = "records"  # of written shards, as long as some are missing
ORIENTATION = 274  # EXIF's number for it


class Form(NamedTuple):
    """How images are kept: `encode` makes the image's member of a sample. Raises BadImage."""

    name: str
    encode: Callable[[bytes], dict[str, bytes]]


class Job(NamedTuple):
    """Shard `number`: the first `limit` images of `entries` that can be used, read from `images`."""

    number: int
    entries: list[Entry]
    limit: int
    images: Path
    form: Form
    folder: Path


class Part(NamedTuple):
    """A written shard: its row of the manifest, its keys, what was met. The row is None where no image was left."""

    row: dict[str, Any] | None
    keys: list[str]
    left_out: list[Mark]
    noted: list[Mark]


def as_png(data: bytes, resolution: int) -> dict[str, bytes]:
    """The central square at `resolution` pixels, as evaluations cut it, without loss. Raises BadImage."""
    pixels = decode_image(data, (resolution, resolution), "exact", ImageLimits())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return {"png": buffer.getvalue()}


def as_it_is(data: bytes, resolution: int) -> dict[str, bytes]:
    """The file itself, once it is seen that it can be decoded. Raises BadImage."""
    decode_image(data, (resolution, resolution), "exact", ImageLimits())
    with Image.open(io.BytesIO(data)) as image:
        return {{"PNG": "png", "WEBP": "webp"}.get(image.format or "", "jpg"): data}


def oddities(data: bytes) -> list[str]:
    """What of a usable image is dealt with on the way, and still worth a line."""
    with Image.open(io.BytesIO(data)) as image:
        orientation = 1
        with suppress(OSError, SyntaxError, ValueError, StructError):  # EXIF that can't be read is taken for none
            orientation = image.getexif().get(ORIENTATION, 1)
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        found = {"grey": grey, "CMYK": image.mode == "CMYK", "turned upright (EXIF)": orientation in range(2, 9)}
    return [cause for cause, is_so in found.items() if is_so]


# ---- shards ----


def write_part(job: Job) -> Part:
    """Write a shard and its record, unless a killed run has left both and nothing was left out then."""
    path = job.folder / f"{job.number:05d}.tar"
    record = job.folder / RECORDS / f"{job.number:05d}.json"
    identity = digest(json.dumps([job.entries, job.limit, job.form.name]))
    found = read_part(record, identity)
    if found is not None and is_whole(found, path):
        return found
    samples, left_out, noted = read_samples(job)
    row = None
    if samples:
        with replacing(path) as temporary:
            write_shard(temporary, samples)
        data = path.read_bytes()
        row = {"name": path.name, "samples": len(samples), "bytes": len(data), "sha256": sha256(data).hexdigest()}
    part = Part(row, [sample.key for sample in samples], left_out, noted)
    write_atomically(record, json.dumps({"identity": identity, "part": part}).encode())
    return part


def read_part(record: Path, identity: str) -> Part | None:
    """What a run with the same `identity` left."""
    if not record.exists():
        return None
    content = json.loads(record.read_text(encoding="utf-8"))
    if content["identity"] != identity:
        return None
    row, keys, left_out, noted = content["part"]
    return Part(row, keys, [Mark(*mark) for mark in left_out], [Mark(*mark) for mark in noted])


def is_whole(part: Part, path: Path) -> bool:
    """Whether the shard is there and needs no second try."""
    if part.row is None or part.left_out or not path.exists():
        return False
    return path.stat().st_size == part.row["bytes"]


def read_samples(job: Job) -> tuple[list[Sample], list[Mark], list[Mark]]:
    """Samples, what was left out, what was noted."""
    samples: list[Sample] = []
    left_out: list[Mark] = []
    noted: list[Mark] = []
    for entry in job.entries:
        if len(samples) == job.limit:
            break
        try:
            data = (job.images / entry.file_name).read_bytes()
            members = job.form.encode(data)
        except BadImage as error:
            left_out.append(Mark(str(error), entry.file_name))
        except FileNotFoundError:
            left_out.append(Mark("missing file", entry.file_name))
        except OSError:
            left_out.append(Mark("file that can't be read", entry.file_name))
        else:
            text = json.dumps({"captions": entry.captions, **entry.about})
            samples.append(Sample(entry.key, {**members, "json": text.encode()}))
            noted += [Mark(cause, entry.file_name) for cause in oddities(data)]
    return samples, left_out, noted
