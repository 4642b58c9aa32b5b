"""What is measured, on what, against what: a YAML file whose hash covers everything that changes a number."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from fluxflow_train.cli import config_folder
from fluxflow_train.errors import UserError

FOLDER = "protocols"
RULES = 1  # of what no key says, such as limits of images and quantisation: raised where they change
CROP = "central-square"  # of the short side, resized with PIL's bicubic
LIST = "keys-by-salted-sha256"  # any first part of the list is a random draw, the same one everywhere
OWN = "run"  # the run's own resolution, or data
TITLES = ("id", "title")  # words that change no number


@dataclass(frozen=True)
class Protocol:
    """`hash` tells whether two results can be compared; local paths are no part of it.

    Args:
        dataset: "openmoji", "run" (the run's own data) or the name of a dataset of shards.
        split: whose images are reconstructed, or whose captions are drawn.
        reference_split: whose images drawn ones are held against; reconstructions are held against what went in.
        train_split: where PCA is fitted and neighbours are looked for; None: the reference.
        resolution: of the images in pixels; "run" until it is known.
        extractor: a name of ours, or a dictionary with `_target_`.
        num_images: the first of the list; None: all.
    """

    id: str
    title: str
    dataset: str
    split: str
    reference_split: str
    train_split: str | None
    resolution: int | str
    crop: str
    resizer: str
    extractor: str | dict[str, Any]
    num_images: int | None
    list: str

    @property
    def content(self) -> dict[str, Any]:
        """All that changes a number, as plain JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in TITLES}
        return values | {"rules": RULES}

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of `content`.

        Raises:
            ValueError: the run's resolution or data are still to be put in.
        """
        if OWN in (self.resolution, self.dataset):
            raise ValueError(f"protocol {self.id}: got resolution {self.resolution} of {self.dataset}, expected both")
        return digest(self.content)

    @property
    def extractor_name(self) -> str:
        return self.extractor if isinstance(self.extractor, str) else str(self.extractor["name"])


def digest(content: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(name: str) -> Protocol:
    """A protocol of ours by name, or any other by the path of its file.

    Raises:
        UserError: there is none, or it is not well formed.
    """
    folder = config_folder() / FOLDER
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in names:
        return parse((folder / f"{name}.yaml").read_text(), f"{name}.yaml")
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        near = get_close_matches(name, names, n=1) or [", ".join(names)]
        hint = f"did you mean {near[0]}?" if near[0] in names else f"there are {near[0]}, or give a FILE.yaml"
        raise UserError(f"there is no protocol {name}: {hint}")
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"protocol={name} can't be read ({reason}): give one of {', '.join(names)}") from error


def parse(text: str, where: str) -> Protocol:
    """Raises UserError, in one line, for what is not a protocol."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is no YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no keys: copy one of conf/{FOLDER}/ and change it")
    known = [field.name for field in fields(Protocol)]
    for key in content:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where} has an unknown key {key}: {hint}")
    for key in known:
        if key not in content:
            raise UserError(f"{where} lacks the key {key}: copy it from one of conf/{FOLDER}/")
    check_values(content, where)
    return Protocol(**content)


def check_values(content: dict[str, Any], where: str) -> None:
    """Raises UserError for a value of the wrong kind."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())

    extractor = content["extractor"]
    described = isinstance(extractor, dict) and {"_target_", "name"} <= set(extractor)
    valid = {
        **{key: (is_word(content[key]), "a word") for key in ("dataset", "split", "reference_split", "resizer")},
        "id": (is_word(content["id"]) and Path(content["id"]).name == content["id"], "a name for a folder"),
        "title": (is_word(content["title"]), "a sentence"),
        "train_split": (content["train_split"] is None or is_word(content["train_split"]), "a word or null"),
        "resolution": (is_count(content["resolution"]) or content["resolution"] == OWN, f"pixels, or {OWN}"),
        "crop": (content["crop"] == CROP, CROP),
        "list": (content["list"] == LIST, LIST),
        "extractor": (is_word(extractor) or described, "a name, or a dictionary with _target_ and name"),
        "num_images": (content["num_images"] is None or is_count(content["num_images"]), "a number, or null for all"),
    }
    for key, (is_valid, expected) in valid.items():
        if not is_valid:
            raise UserError(f"{where}: {key}={content[key]} must be {expected}")


def resolved(protocol: Protocol, resolution: int) -> Protocol:
    """With the run's resolution where the protocol leaves it to the run."""
    return replace(protocol, resolution=resolution) if protocol.resolution == OWN else protocol
