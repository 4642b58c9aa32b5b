"""Captions: text and json members, damaged and odd ones included."""

import json

import numpy as np
import pytest

from fluxflow_train.data.captions import MAX_BYTES, MAX_CHARACTERS, choose, parse_captions


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a dog", ["a dog"]),
        (b"\xef\xbb\xbfa dog\r\n", ["a dog"]),
        ("à côté".encode(), ["à côté"]),
        (b"", []),
        (b" \n\t", []),
        (b"a\0 dog\0", ["a dog"]),
    ],
)
def test_txt(data, expected):
    assert parse_captions(data, "txt") == (expected, {})


def test_bytes_that_are_not_utf8_are_replaced_and_reported():
    assert parse_captions("à la".encode("latin-1"), "txt") == (
        ["� la"],
        {"caption bytes that are not UTF-8, replaced": 1},
    )


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"caption": "one"}, ["one"]),
        ({"captions": ["one", " ", "two"]}, ["one", "two"]),
        ({"captions": ["one"], "caption": "other"}, ["one"]),
        ({"captions": [], "caption": "other"}, ["other"]),
        ({"caption": None}, []),
        ({"caption": 3, "captions": [1, "one", None]}, ["one"]),
        ({"text": "one"}, []),
        (["one"], []),
    ],
)
def test_json(record, expected):
    assert parse_captions(json.dumps(record).encode(), "json")[0] == expected


def test_json_with_a_lone_surrogate():
    (caption,), _ = parse_captions(b'{"caption": "a \\ud83d dog"}', "json")
    caption.encode("utf-8")
    assert caption == "a dog"


@pytest.mark.parametrize("data", [b"{not json", b"", b"[" * 100_000])
def test_broken_json_is_no_caption(data):
    assert parse_captions(data, "json")[0] == []


def test_choose_is_even():
    draws = np.random.default_rng(0)
    chosen = [choose(["a", "b", "c"], draws) for _ in range(3000)]
    for caption in "abc":
        assert abs(chosen.count(caption) - 1000) < 100


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["meta.text"], ["deep"]),
        (["annotations.*.caption"], ["one", "two"]),
        (["annotations.1.caption"], ["two"]),
        (["annotations.7.caption", "nothing", "meta.all"], ["x", "y"]),
        (["*.text"], ["deep"]),
        (["annotations.x", "meta.text.0"], []),
    ],
)
def test_paths(fields, expected):
    record = {"meta": {"text": "deep", "all": ["x", "y"]}, "annotations": [{"caption": "one"}, {"caption": "two"}]}
    assert parse_captions(json.dumps(record).encode(), "json", fields)[0] == expected


def test_cleaning():
    assert parse_captions(b" a&amp;b\x07 <i>c</i>\n\td\xc2\xa0e ", "txt")[0] == ["a&b <i>c</i> d e"]


def test_long_ones_are_cut_and_counted():
    (caption,), noted = parse_captions(b"word " * 20_000, "txt")
    assert len(caption) == MAX_CHARACTERS
    assert noted == {"captions over 4096 characters, cut": 1}
    assert parse_captions(b" " * 50_000 + b"a dog", "txt") == ([], {"captions over 4096 characters, cut": 1})
    assert parse_captions(b"x" * (MAX_BYTES + 1), "txt") == ([], {"caption files over 1 MiB, ignored": 1})


def test_broken_json_is_counted():
    assert parse_captions(b"{", "json")[1] == {"broken JSON, taken as no caption": 1}
    assert parse_captions(b'{"caption": ' + b"9" * 5000 + b"}", "json")[0] == []
