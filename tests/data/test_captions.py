"""Captions: text and json members, damaged and odd ones included."""

import json

import numpy as np
import pytest

from fluxflow_train.data.captions import choose, parse_captions


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
    assert parse_captions(data, "txt") == (expected, False)


def test_bytes_that_are_not_utf8_are_replaced_and_reported():
    assert parse_captions("à la".encode("latin-1"), "txt") == (["� la"], True)


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
    assert caption == "a  dog"


@pytest.mark.parametrize("data", [b"{not json", b"", b"[" * 100_000])
def test_broken_json_is_no_caption(data):
    assert parse_captions(data, "json")[0] == []


def test_choose_is_even():
    draws = np.random.default_rng(0)
    chosen = [choose(["a", "b", "c"], draws) for _ in range(3000)]
    for caption in "abc":
        assert abs(chosen.count(caption) - 1000) < 100
