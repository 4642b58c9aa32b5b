"""Look at every byte of a shard that training would read: the strict table, then every image decoded; or mend it."""

import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxflow_train.data.images import BadImage, ImageLimits, decode_image
from fluxflow_train.data.salvage import salvaged
from fluxflow_train.data.sidecar import PROBLEMS
from fluxflow_train.data.table import build_table
from fluxflow_train.data.writer import MANIFEST, write_shard
from fluxflow_train.errors import UserError
from fluxflow_train.files import sha256_of

_RESOLUTION = (64, 64)  # of the trial decoding; damage shows at any


@dataclass
class ShardReport:
    """What was found in one shard.

    `error`: why nothing of it can be read; `damaged`: images by cause, with the `first` key of each;
    `noted`: what training copes with. After a repair `written` is the manifest's row of the clean shard and `dropped`
    what could not be kept, by cause.
    """

    path: str
    samples: int = 0
    error: str = ""
    damaged: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)
    written: dict[str, Any] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        """Whether there is no damage."""
        return not self.error and not self.damaged


def check_shard(path: str, limits: ImageLimits) -> ShardReport:
    """Check the tar at `path`, also against a manifest beside it; writes nothing."""
    report = ShardReport(path)
    try:
        table = build_table(path)
    except UserError as error:
        report.error = str(error)
        return report
    expected = _published(Path(path))
    if expected is not None and sha256_of(Path(path)) != expected:
        report.error = f"shard {path} is not the file that the {MANIFEST} beside it names (sha256)"
    report.samples = len(table)
    report.noted.update(table.header["counts"])
    report.noted["no caption"] = int((table.column("num_captions") == 0).sum())
    report.noted["dots in the key"] = table.header["dotted_keys_count"]
    problems, offsets, sizes = (table.column(name) for name in ("problem", "image_offset", "image_size"))
    with open(path, "rb") as file:
        for row, problem in enumerate(problems):
            cause = PROBLEMS[problem]
            if not cause:
                cause = _decoding_problem(os.pread(file.fileno(), int(sizes[row]), int(offsets[row])), limits)
            if cause:
                report.damaged[cause] += 1
                report.first.setdefault(cause, table.key(row))
    report.noted = +report.noted
    return report


def repair_shard(path: str, folder: Path, limits: ImageLimits) -> ShardReport:
    """Check the tar at `path` and write what is whole of it under the same name into `folder`, then read it strictly.

    Where nothing of it can be saved, nothing is written and `dropped` says so.
    """
    report = check_shard(path, limits)
    target = folder / Path(path).name
    part = folder / f".{target.name}.part"
    try:
        # Names too long for USTAR get PAX headers; all others are written as in USTAR.
        write_shard(part, salvaged(path, limits, report.dropped), tarfile.PAX_FORMAT)
        count = len(build_table(str(part)))
        row = {"name": target.name, "samples": count, "bytes": part.stat().st_size, "sha256": sha256_of(part)}
        os.link(part, target)  # unlike a rename it never replaces a file
        report.written = row
    except FileExistsError as error:
        raise UserError(f"{target} is there already: give an empty folder") from error
    except UserError as error:
        report.dropped[str(error)] += 1
    finally:
        part.unlink(missing_ok=True)
    report.dropped = +report.dropped
    return report


def _published(path: Path) -> str | None:
    try:
        rows = json.loads((path.parent / MANIFEST).read_bytes())["shards"]
        return {row["name"]: row["sha256"] for row in rows}.get(path.name)
    except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
        return None


def _decoding_problem(data: bytes, limits: ImageLimits) -> str:
    try:
        decode_image(data, _RESOLUTION, "exact", limits)
    except BadImage as error:
        return str(error)
    return ""
