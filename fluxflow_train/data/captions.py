"""Captions from the text member of a sample: `txt` holds one, `json` one or several."""

import html
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

FIELDS = ("captions", "caption")
MAX_BYTES = 1 << 20  # of a member that is read
MAX_CHARACTERS = 4096  # of a caption that is kept; every text backbone takes far fewer
_MAX_CLEANED = 8 * MAX_CHARACTERS  # of one that is looked at: entities and white space take some


def parse_captions(data: bytes, extension: str, fields: Sequence[str] = FIELDS) -> tuple[list[str], Counter[str]]:
    """The usable captions of a `txt` or `json` member, cleaned, and what had to be done to them, by cause.

    Cleaned: HTML entities resolved, control characters and lone surrogates (json can spell them) taken out, white space
    made single blanks, cut at MAX_CHARACTERS. What is empty then is left out.

    `fields`: where the captions of a `json` member are; the first path that leads to any counts. A path names fields
    and list positions with dots between, `*` for all: `annotations.*.caption`.
    """
    noted: Counter[str] = Counter()
    if len(data) > MAX_BYTES:
        noted["caption files over 1 MiB, ignored"] += 1
        return [], noted
    text = data.decode("utf-8-sig", errors="replace")
    noted["caption bytes that are not UTF-8, replaced"] += "\ufffd" in text
    found: list[Any] = [text]
    if extension == "json":
        found = _json_captions(text, fields)
        if found is _BROKEN:
            noted["broken JSON, taken as no caption"] += 1
    texts = [text for text in found if isinstance(text, str)]
    captions = [_clean(text) for text in texts]
    for raw, caption in zip(texts, captions, strict=True):
        cut = len(caption) > MAX_CHARACTERS or len(raw) > _MAX_CLEANED
        noted[f"captions over {MAX_CHARACTERS} characters, cut"] += cut
    return [caption[:MAX_CHARACTERS] for caption in captions if caption], +noted


def choose(captions: list[str], draws: np.random.Generator) -> str:
    """One of `captions`, each as likely."""
    return captions[int(draws.integers(len(captions)))]


_BROKEN: list[Any] = []


def _json_captions(text: str, fields: Sequence[str]) -> list[Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also of a number with more digits than Python converts
        return _BROKEN
    for field in fields:
        found = [value for value in _at(record, field.split(".")) if value]
        if found:
            return found
    return []


def _at(value: Any, path: list[str]) -> Iterator[Any]:
    """What `path` leads to in `value`; the members of a list that stands at its end."""
    if not path:
        yield from value if isinstance(value, list) else [value]
        return
    step, rest = path[0], path[1:]
    if isinstance(value, dict):
        inner = list(value.values()) if step == "*" else [value[step]] if step in value else []
    elif isinstance(value, list):
        inner = value if step == "*" else value[int(step) : int(step) + 1] if step.isdecimal() else []
    else:
        inner = []
    for each in inner:
        yield from _at(each, rest)


def _clean(caption: str) -> str:
    caption = html.unescape(caption[:_MAX_CLEANED])
    if caption.isprintable():  # most are: no other white space than blanks, nothing to take out
        return " ".join(caption.split())
    kept = (" " if c.isspace() else c for c in caption if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())
