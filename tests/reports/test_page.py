import copy
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from fluxflow_train.reports.charts import Axis, line_chart, short, value_axis
from fluxflow_train.reports.page import number, render

VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return render(report)


def test_the_page_is_well_formed_and_shows_every_number(report: dict[str, Any], page: str) -> None:
    text = " ".join(read(page).texts)
    for result in report["results"]:
        assert number(result["value"], result["unit"]) in text, result["name"]
    for check in report["checks"]:
        assert check["name"] in text
    assert report["command"] in text
    assert report["model"]["weights_sha256"] in text


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", page)
    for tag, name, value in read(page).attributes:
        if name in ("src", "href", "srcset"):
            assert tag == "img" and value.startswith("data:image/png;base64,")


def test_hostile_captions_are_text(page: str) -> None:
    assert "<script>alert" not in page and "<img src=x" not in page
    reader = read(page)
    assert any("<script>alert('x')</script>" in text for text in reader.texts)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)


def test_hostile_names_of_curves_and_modules_are_text(report: dict[str, Any]) -> None:
    hostile = copy.deepcopy(report)
    name = '"><script>alert(1)</script>'
    hostile["figures"]["curves"][name] = hostile["figures"]["curves"]["train/loss"]
    hostile["figures"]["bezier"][0]["name"] = name
    hostile["model"]["experiment"] = name
    page = render(hostile)
    read(page)
    assert "<script>alert" not in page


def test_charts_are_xml_and_carry_their_data(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(charts) == 1 + 3 + 3
    with_data = [e for e in map(ElementTree.fromstring, charts) if "data-chart" in e.attrib]
    assert {s["name"] for e in with_data for s in json.loads(e.attrib["data-chart"])["series"]} == {
        "train/loss",
        "train/psnr",
        "val/psnr",
        "custom/thing",
    }


def test_it_fits_a_phone_and_the_dark(page: str) -> None:
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page and "max-width: 760px" in page


@pytest.mark.parametrize("status", ["smoke", "partial"])
def test_an_unfinished_report_says_so_on_top(report: dict[str, Any], status: str) -> None:
    page = render(report | {"status": status, "status_reasons": ["because of this"]})
    assert f'class="banner {status}"' in page and "because of this" in page


def test_the_page_needs_no_curves_and_no_extractor(evaluate: Any, without_extractor: None) -> None:
    bare = evaluate(20, 12, model={})
    bare["figures"] |= {"curves": {}, "bezier": []}
    page = render(bare)
    read(page)
    assert "<h2>Training</h2>" not in page and "pip install" in page


def test_an_undefined_headline_is_a_dash(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["results"][0] |= {"value": None, "raw": None, "interval": None}
    assert "–" in render(broken)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-8.2, 0.3), (12.1, 24.9), (1e-7, 3e-7), (0.0, 45_000.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-12 <= t <= high * (1 + 1e-9) and len(short(t)) <= 7 for t in ticks)


def test_wide_positive_ranges_are_logarithmic() -> None:
    assert value_axis([10.0**-i for i in range(6)]).log
    assert not value_axis([0.0, 1000.0]).log
    assert not value_axis([1.0, 2.0]).log


def test_a_single_constant_point_can_be_drawn() -> None:
    series = {"a": {"x": [0.0], "y": [0.0], "low": [0.0], "high": [0.0]}}
    ElementTree.fromstring(line_chart(series, title="a", x_label="images seen", unit=""))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(20000, "", "20 k"), (1364360, "", "1.36 M"), (2456.1, "", "2,456"), (23.637, "dB", "23.64"), (None, "", "–")],
)
def test_numbers_are_written_for_people(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text
