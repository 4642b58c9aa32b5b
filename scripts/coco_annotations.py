"""A COCO captions file as a frozen list: which images, in which order, and which caption of each stands first.

The rule is published and needs no file of ours: images that have a caption, by the sha256 of "evaluation <key>"
(the key is the image id in 12 digits); the captions of an image by the sha256 of their annotation id (decimal digits).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fluxflow_train.data.captions import parse_captions
from fluxflow_train.errors import UserError

RULE = (
    "images that have a caption by sha256 of 'evaluation <image id in 12 digits>', captions by sha256 of the "
    "annotation id in decimal digits, the first one counts"
)
KEPT = ("license", "flickr_url")  # of what COCO says of an image, where it is there


class Mark(NamedTuple):
    """Something met on the way, and where."""

    cause: str
    where: str


class Entry(NamedTuple):
    """An image that the annotations describe; `captions` in the order of the rule, `about` as in COCO."""

    key: str
    file_name: str
    captions: list[str]
    about: dict[str, Any]


class Annotations(NamedTuple):
    """`entries` in the order of the rule; `left_out` of `num_rows` images and annotations; `licenses` as in COCO."""

    entries: list[Entry]
    left_out: list[Mark]
    num_rows: int
    licenses: list[Any]
    sha256: str


def read_annotations(path: Path) -> Annotations:
    """
    Raises:
        UserError: there is no such file, or it is no COCO captions file.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise UserError(f"annotations={path} can't be read ({error.strerror}): give captions_val2014.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations={path} is no JSON ({error}): unpack or download it again") from error
    content = content if isinstance(content, dict) else {}
    images, rows = (content.get(name) for name in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(rows, list):
        raise UserError(f"annotations={path} has no lists images and annotations: give captions_val2014.json")
    if not any(isinstance(row, dict) and "caption" in row for row in rows):
        raise UserError(f"annotations={path} has no captions (is it instances_*.json?): give captions_val2014.json")
    entries, left_out = list_entries(images, rows)
    licenses = content.get("licenses")
    return Annotations(
        entries,
        left_out,
        len(images) + len(rows),
        licenses if isinstance(licenses, list) else [],
        hashlib.sha256(data).hexdigest(),
    )


def list_entries(image_rows: Sequence[Any], annotation_rows: Sequence[Any]) -> tuple[list[Entry], list[Mark]]:
    """All images with a caption, in the order of the rule; what could not be used, by cause."""
    images, marks = images_by_id(image_rows)
    captions, more = captions_by_image(annotation_rows, set(images))
    entries = []
    for number, image in images.items():
        key = f"{number:012d}"
        if number not in captions:
            marks.append(Mark("image without a caption", key))
            continue
        pairs = sorted(captions[number], key=lambda pair: digest(str(pair[0])))
        about = {"image_id": number, "annotation_ids": [annotation for annotation, _ in pairs]}
        about |= {name: image[name] for name in ("file_name", *KEPT) if name in image}
        entries.append(Entry(key, image["file_name"], [text for _, text in pairs], about))
    return sorted(entries, key=lambda entry: digest(f"evaluation {entry.key}")), marks + more


def images_by_id(rows: Sequence[Any]) -> tuple[dict[int, dict[str, Any]], list[Mark]]:
    """Of an id that is there twice, the first counts."""
    images: dict[int, dict[str, Any]] = {}
    marks = []
    for place, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        number, name = row.get("id"), row.get("file_name")
        if not is_id(number) or not isinstance(name, str) or not is_plain(name):
            marks.append(Mark("image without an id or a plain file name", f"images[{place}]"))
        elif number in images:
            marks.append(Mark("image id that came before", str(number)))
        else:
            images[number] = row
    return images, marks


def captions_by_image(rows: Sequence[Any], known: set[int]) -> tuple[dict[int, list[tuple[int, str]]], list[Mark]]:
    """(annotation id, text) of each image id; texts as readers of shards will see them."""
    captions: dict[int, list[tuple[int, str]]] = {}
    seen: set[int] = set()
    marks = []
    for place, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        number, image, text = (row.get(name) for name in ("id", "image_id", "caption"))
        if not is_id(number) or not is_id(image) or not isinstance(text, str):
            marks.append(Mark("annotation without ids or a caption", f"annotations[{place}]"))
            continue
        cleaned = parse_captions(json.dumps({"caption": text}).encode(), "json")[0]
        if number in seen:
            marks.append(Mark("annotation id that came before", str(number)))
        elif image not in known:
            marks.append(Mark("annotation of no image", str(number)))
        elif not cleaned:
            marks.append(Mark("empty caption", str(number)))
        else:
            captions.setdefault(image, []).append((number, cleaned[0]))
        seen.add(number)
    return captions, marks


def is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_plain(name: str) -> bool:
    """Whether it names a file in a folder and no place beyond."""
    return name not in ("", ".", "..") and name.isprintable() and Path(name).name == name


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def list_digest(lines: Sequence[str]) -> str:
    """As a report's `reference.list_sha256` of keys and `samples.prompts_sha256` of captions."""
    return digest("\n".join(lines))
