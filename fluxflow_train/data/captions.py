"""Captions from the text member of a sample: `txt` holds one, `json` one or several."""

import json
from typing import Any

import numpy as np

_FIELDS = ("captions", "caption")


def parse_captions(data: bytes, extension: str) -> tuple[list[str], bool]:
    """The captions of a `txt` or `json` member, empty ones left out, and whether bytes had to be replaced.

    A `json` member holds an object with `captions` (a list) or `caption` (a text); anything else means no caption.
    """
    text = data.decode("utf-8-sig", errors="replace")
    replaced = "\ufffd" in text
    found: list[Any] = [text]
    if extension == "json":
        found = _json_captions(text)
    cleaned = [_clean(caption) for caption in found if isinstance(caption, str)]
    return [caption for caption in cleaned if caption], replaced


def choose(captions: list[str], draws: np.random.Generator) -> str:
    """One of `captions`, each as likely."""
    return captions[int(draws.integers(len(captions)))]


def _json_captions(text: str) -> list[Any]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return []
    if not isinstance(record, dict):
        return []
    for field in _FIELDS:
        value = record.get(field)
        if value:
            return value if isinstance(value, list) else [value]
    return []


def _clean(caption: str) -> str:
    """Without NULs and lone surrogates (json can spell them), which no tokenizer takes, and outer white space."""
    kept = (character for character in caption if character != "\0" and not 0xD800 <= ord(character) <= 0xDFFF)
    return "".join(kept).strip()
