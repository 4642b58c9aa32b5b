"""Which samples of an index are used, by policy, and what was left out and why.

N samples of the index, M of them selected.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from fluxflow_train.data.images import ImageLimits
from fluxflow_train.data.index import Index
from fluxflow_train.data.sidecar import PROBLEMS
from fluxflow_train.errors import UserError

MissingCaption = Literal["keep", "drop", "fail"]


@dataclass(frozen=True)
class Policy:
    """What is done with samples that are damaged, or unlike the rest.

    `missing_caption`: "keep" gives an empty caption, "drop" leaves the sample out, "fail" is an error.
    `max_bad_fraction`: more damaged samples than this part of the data is an error.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    missing_caption: MissingCaption = "keep"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.missing_caption not in get_args(MissingCaption):
            raise ValueError(f"missing_caption: got {self.missing_caption!r}, expected {get_args(MissingCaption)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: got {self.max_bad_fraction}, expected 0 to 1")


class Selection:
    """The samples of `index` that `policy` lets through, numbered 0 to M - 1: the numbers that batches carry.

    `damaged` and `left_out` count what was dropped, by cause; `noted` what was kept but is worth a line.
    """

    def __init__(self, index: Index, policy: Policy) -> None:
        self.index = index
        self.policy = policy
        problem, width, height = (index.column(name) for name in ("problem", "width", "height"))
        no_caption = index.column("num_captions") == 0
        limits = policy.limits
        longest, shortest = np.maximum(width, height), np.minimum(width, height)
        damages = {cause: problem == code for code, cause in enumerate(PROBLEMS) if cause}
        damages["too many pixels"] |= width * height > limits.max_pixels
        choices = {
            "too small": shortest < limits.min_side,
            "too elongated": longest > limits.max_aspect * shortest,
            "no caption": no_caption & (policy.missing_caption == "drop"),
        }
        keep = np.ones(len(index), bool)
        self.damaged = _take_out(keep, damages)
        self.left_out = _take_out(keep, choices)
        self.noted = index.counts
        missing = keep & no_caption
        if policy.missing_caption == "fail" and missing.any():
            self._fail(missing, "no caption", "add it, or set data.missing_caption to keep or drop")
        if missing.any():
            self.noted["no caption"] = int(missing.sum())
        self.check_damage(sum(self.damaged.values()), dict(self.damaged))
        if not keep.any():
            raise UserError(f"no usable sample in {index.shards[0]} and its fellows: {dict(self.left_out)}")
        self._rows = np.flatnonzero(keep)
        ends = np.cumsum(index.sizes)
        self.shard_sizes = np.diff(np.searchsorted(self._rows, ends), prepend=0).tolist()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the index and of which samples were selected from it."""
        return hashlib.sha256(self.index.fingerprint.encode() + self._rows.astype("<i8").tobytes()).hexdigest()

    def column(self, name: str) -> np.ndarray:
        """A column of the index, of the selected samples: int64 (M,)."""
        return self.index.column(name)[self._rows]

    def row(self, sample: int) -> int:
        """The number in the index of selected sample `sample`."""
        return int(self._rows[sample])

    def name(self, sample: int) -> str:
        """Key and shard of selected sample `sample`, for messages."""
        row = self.row(sample)
        return f"{self.index.key(row)} in {self.index.shards[self.index.place(row)[0]]}"

    def check_damage(self, count: int, causes: dict[str, int]) -> None:
        """Raises UserError if `count` damaged samples are more than the policy allows."""
        if count > self.policy.max_bad_fraction * len(self.index):
            raise UserError(
                f"{count} of {len(self.index)} samples are damaged {causes}, more than data.max_bad_fraction ="
                f" {self.policy.max_bad_fraction:g} allows: run scripts/check_shards.py on the shards to see which"
            )

    def _fail(self, mask: np.ndarray, what: str, remedy: str) -> None:
        row = int(np.flatnonzero(mask)[0])
        shard = self.index.shards[self.index.place(row)[0]]
        raise UserError(f"{mask.sum()} samples with {what}, first {self.index.key(row)} in {shard}: {remedy}")


def _take_out(keep: np.ndarray, masks: dict[str, np.ndarray]) -> Counter[str]:
    """Clear in `keep` what `masks` name, each sample counted under its first cause."""
    counts: Counter[str] = Counter()
    for cause, mask in masks.items():
        out = keep & mask
        keep &= ~mask
        if out.any():
            counts[cause] = int(out.sum())
    return counts
