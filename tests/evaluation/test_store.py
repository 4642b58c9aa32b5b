import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.store import FeatureStore, close, difference

REMEDY = "delete it"


def rows(chunk: range) -> dict[str, Tensor]:
    numbers = torch.tensor(list(chunk))
    return {"features": numbers[:, None] * torch.ones(3), "psnr": numbers.double(), "constant": numbers == 5}


def filled(folder: Path, count: int, **identity: Any) -> FeatureStore:
    store = FeatureStore(folder, count, {"of": "test", **identity}, REMEDY)
    store.begin()
    for chunk in store.chunks(count):
        store.write(chunk, rows(chunk))
    return store


@pytest.mark.parametrize("count", [1, 2, 31, 32, 97, 130, 2048, 2100])
def test_every_number_is_in_one_range(tmp_path: Path, count: int) -> None:
    store = FeatureStore(tmp_path, count, {}, REMEDY)
    chunks = store.chunks(count)
    assert [number for chunk in chunks for number in chunk] == list(range(count))
    assert max(map(len, chunks)) <= 64
    assert len(chunks) >= min(count, 32)


def test_rows_come_back_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found, digest = filled(tmp_path, 97).read(97)
    assert found["features"].dtype == torch.float32 and found["psnr"].dtype == torch.float64
    assert found["psnr"].tolist() == list(range(97))
    assert found["constant"].nonzero().flatten().tolist() == [5]
    part, other = FeatureStore(tmp_path, 97, {"of": "test"}, REMEDY).read(10)
    assert part["features"][:, 1].tolist() == list(range(10)) and other != digest


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-1] ^= 1
    path.write_bytes({"bit": data, "cut": data[:-9], "empty": b"", "other": b"\0" * len(data)}[how])


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "other"])
def test_damage_is_noticed(tmp_path: Path, how: str) -> None:
    store = filled(tmp_path, 70)
    second = store.chunks(70)[1]
    damage(store.path(second), how)
    assert store.survey(70) == ([], [second])
    with pytest.raises(UserError, match=r"missing or damaged: delete it"):
        store.read(70)
    store.path(second).unlink()
    assert store.survey(70) == ([second], [])
    store.write(second, rows(second))
    assert store.survey(70) == ([], []) and len(store.read(70)[0]["psnr"]) == 70


def test_a_file_of_another_range_is_no_file_of_this_one(tmp_path: Path) -> None:
    store = filled(tmp_path, 97)  # 33 ranges of 3 and less
    last, first = store.chunks(97)[-1], store.chunks(97)[0]
    store.path(last).write_bytes(store.path(first).read_bytes())
    assert store.survey(97)[1] == [last]


def test_rows_of_something_else_are_refused(tmp_path: Path) -> None:
    fingerprint = [0.25, 1.5]
    filled(tmp_path, 8, extractor={"name": "a", "fingerprint": fingerprint})
    same = {"of": "test", "extractor": {"name": "a", "fingerprint": [0.250001, 1.5]}}
    FeatureStore(tmp_path, 8, same, REMEDY)
    for identity, count, key in (
        ({"of": "other", "extractor": same["extractor"]}, 8, "of"),
        ({"of": "test", "extractor": {"name": "a", "fingerprint": [0.251, 1.5]}}, 8, "extractor.fingerprint"),
        ({"of": "test", "extractor": {"name": "b", "fingerprint": fingerprint}}, 8, "extractor.name"),
        (same, 9, "count"),
    ):
        with pytest.raises(UserError, match=f"made with another {key}: delete it"):
            FeatureStore(tmp_path, count, identity, REMEDY)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    filled(tmp_path, 8)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="delete it"):
        FeatureStore(tmp_path, 8, {"of": "test"}, REMEDY)


def test_a_row_too_few_is_a_defect(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 80, {}, REMEDY)
    with pytest.raises(ValueError, match="got 1 rows, expected 2"):
        store.write(range(0, 2), {"features": torch.zeros(1, 3)})
    assert not list(tmp_path.iterdir())


def test_differences_have_a_path() -> None:
    assert difference({"a": {"b": 1}}, json.loads('{"a": {"b": 1}}')) == ""
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b"
    assert difference({"a": {"b": 1}}, {"a": 3}) == "a"
    assert not close([1.0], [1.0, 2.0]) and not close([1.0], None) and close([1.0], [1.00005])
