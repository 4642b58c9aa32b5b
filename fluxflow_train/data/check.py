"""Look at every byte of a shard that training would read: the strict table, then every image decoded."""

import os
from collections import Counter
from dataclasses import dataclass, field

from fluxflow_train.data.images import BadImage, ImageLimits, decode_image
from fluxflow_train.data.sidecar import PROBLEMS
from fluxflow_train.data.table import build_table
from fluxflow_train.errors import UserError

_RESOLUTION = 64  # of the trial decoding; damage shows at any


@dataclass
class ShardReport:
    """What was found in one shard.

    `error`: why nothing of it can be read; `damaged`: images by cause, with the `first` key of each;
    `noted`: what training copes with.
    """

    path: str
    samples: int = 0
    error: str = ""
    damaged: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        """Whether there is no damage."""
        return not self.error and not self.damaged


def check_shard(path: str, limits: ImageLimits) -> ShardReport:
    """Check the tar at `path`; writes nothing."""
    report = ShardReport(path)
    try:
        table = build_table(path)
    except UserError as error:
        report.error = str(error)
        return report
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


def _decoding_problem(data: bytes, limits: ImageLimits) -> str:
    try:
        decode_image(data, (_RESOLUTION, _RESOLUTION), "exact", limits)
    except BadImage as error:
        return str(error)
    return ""
