"""The user's own WebDataset tars, named by brace patterns."""

import re

from fluxflow_train.data.sources import SPLITS, Split
from fluxflow_train.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards:
    """Tars with `.jpg`, `.png` or `.webp` and `.txt` or `.json`: patterns such as `/data/train-{00000..00099}.tar`.

    `val` serves as the tune split, and as the test split too unless `test` is given.
    """

    def __init__(self, train: str, val: str, test: str | None = None) -> None:
        self._patterns: dict[Split, str] = {"train": train, "tune": val, "test": val if test is None else test}

    def prepare(self) -> None:
        """Nothing to write: the tars are there."""

    def shards(self, split: Split) -> list[str]:
        """The paths that the pattern of `split` spells."""
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
        return expand_braces(self._patterns[split])


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{00..12}` spelled out as a shell does, the leftmost changing slowest.

    Raises:
        UserError: a brace holds neither, or has no partner.
    """
    match = _BRACES.search(pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"shard pattern {pattern}: a brace has no partner; write it like train-{{000..099}}.tar")
        return [pattern]
    choices = _choices(match[1], pattern)
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


def _choices(inside: str, pattern: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if first > last:
            raise UserError(f"shard pattern {pattern}: the range {inside} is empty; write the smaller number first")
        return [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]
    if "," in inside:
        return inside.split(",")
    raise UserError(f"shard pattern {pattern}: {{{inside}}} is neither a range like 000..099 nor a list like a,b")
