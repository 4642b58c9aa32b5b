import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxflow_train.cli import config_folder
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.protocol import FOLDER, Protocol, load, parse, resolved

NAMES = ("openmoji-test", "openmoji-train-ref", "coco2014-val-30k", "coco2017-val-5k")


def test_the_protocols_that_come_along() -> None:
    assert sorted(path.stem for path in (config_folder() / FOLDER).glob("*.yaml")) == sorted(NAMES)
    hashes = {resolved(load(name), 64).hash for name in NAMES}
    assert len(hashes) == len(NAMES)
    assert all(load(name).id == name for name in NAMES)


def test_coco_is_frozen() -> None:
    """Numbers that were published under these names stay comparable: a change asks for a new name."""
    assert load("coco2014-val-30k").hash == "d532ce525f1dc41b8785c14778a4808496de6490be3164426f39706cc5022bc1"
    assert load("coco2017-val-5k").hash == "d2fc1e2117b24da135fe74aa6ee9ee8f4433a093f738849d2acf245f51427611"


def test_the_hash_is_of_canonical_json(protocol: Protocol) -> None:
    whole = resolved(protocol, 32)
    with pytest.raises(ValueError, match="expected both"):
        _ = whole.hash  # the data are still "run"
    coco = load("coco2014-val-30k")
    text = json.dumps(
        {
            "crop": "central-square",
            "dataset": "coco2014",
            "extractor": "inception-v3-compat",
            "list": "keys-by-salted-sha256",
            "num_images": 30000,
            "reference_split": "val",
            "resizer": "tf1",
            "resolution": 256,
            "rules": 1,
            "split": "val",
            "train_split": None,
        },
        separators=(",", ":"),
    )
    assert coco.hash == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("id", "other", False),
        ("title", "Other words", False),
        ("dataset", "other", True),
        ("split", "other", True),
        ("reference_split", "other", True),
        ("train_split", None, True),
        ("resolution", 128, True),
        ("resizer", "clean", True),
        ("extractor", "efficientnet_lite0", True),
        ("num_images", 7, True),
    ],
)
def test_the_hash_covers_what_changes_a_number(content: dict[str, Any], key: str, value: Any, changes: bool) -> None:
    usual = content | {"dataset": "shards", "resolution": 64}
    one, other = (parse(json.dumps(each), "test").hash for each in (usual, usual | {key: value}))
    assert (one != other) == changes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"num_image": 3}, "unknown key num_image: did you mean num_images?"),
        ({"resolution": 0}, "resolution=0 must be pixels, or run"),
        ({"resolution": True}, "resolution=True must be"),
        ({"num_images": "many"}, "num_images=many must be a number"),
        ({"crop": "left"}, "crop=left must be central-square"),
        ({"extractor": {"name": "x"}}, "with _target_ and name"),
        ({"id": "../up"}, "must be a name for a folder"),
        ({"split": ""}, "split= must be a word"),
    ],
)
def test_a_file_that_is_none_is_answered_in_one_line(
    write_protocol: Callable[..., Path], words: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        load(str(write_protocol(**words)))
    assert said in str(caught.value)


def test_a_missing_key_and_no_yaml(content: dict[str, Any], tmp_path: Path) -> None:
    del content["resizer"]
    with pytest.raises(UserError, match="lacks the key resizer"):
        parse(json.dumps(content), "test")
    with pytest.raises(UserError, match=r"^[^\n]* is no YAML[^\n]*$"):
        parse("a: [1", "test")
    with pytest.raises(UserError, match="holds no keys"):
        parse("- 1", "test")
    with pytest.raises(UserError, match="can't be read"):
        load(str(tmp_path / "none.yaml"))


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean coco2014-val-30k"):
        load("coco2014-val30k")
    with pytest.raises(UserError, match=r"there are .*openmoji-test.*FILE\.yaml"):
        load("xyz")
