"""The report of a study, from its dictionary alone, as a browser shows it."""

import copy
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markupsafe import escape
from PIL import Image

from fluxflow_train.errors import UserError
from fluxflow_train.reports import schema, study_markdown
from fluxflow_train.reports.charts import Axis
from fluxflow_train.reports.page import number
from fluxflow_train.reports.study_charts import apart, log_ticks, whisker
from fluxflow_train.reports.study_page import render, write_study_report
from fluxflow_train.reports.study_words import between, fine, missing, signed
from tests.reports.browser import browse, needs_browser, overflow, screenshot
from tests.reports.study_example import flow, full, minimal
from tests.reports.test_page import read

HOSTILE = """<b>"'><script>alert(1)</script>|`"""
MANY = ("bezier", *(f"arm{i}" for i in range(1, 12)))
STUDIES = {
    "full": full,
    "minimal": minimal,
    "flow": flow,
    "twelve arms": lambda: full(MANY),
    "two seeds": lambda: full(seeds=2),
    "one seed": lambda: full(seeds=1),
}


@pytest.fixture(scope="module", params=STUDIES)
def study(request: Any) -> dict[str, Any]:
    return STUDIES[request.param]()


@pytest.fixture(scope="module")
def page(study: dict[str, Any]) -> str:
    return render(study)


def test_the_schema_accepts_it(study: dict[str, Any]) -> None:
    schema.check(study, "study_report/v1")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("schema",), "fid_report/v1"),
        (("answer", "verdict"), "good"),
        (("metric", "better"), "bigger"),
        (("counts", "finished"), -1),
        (("cells", 0, "mean"), "21"),
        (("cells", 0, "colour"), "red"),
        (("comparisons", 0, "equivalent"), 1),
        (("ratios", 0, "lines"), ...),
        (("pictures", 0, "input"), "https://example.org/x.png"),
        (("targets", "rows", 0, "published"), ["500M"]),
        (("failures", 0, "event"), "vanished"),
        (("runs", 0, "command"), None),
        (("provenance", "command"), ...),
        (("warnings",), ...),
    ],
)
def test_the_schema_refuses_a_broken_one(where: tuple[Any, ...], value: Any) -> None:
    broken: Any = full()
    part = broken
    for key in where[:-1]:
        part = part[key]
    if value is ...:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    with pytest.raises(ValueError, match=r"no study_report/v1: at "):
        schema.check(broken, "study_report/v1")


def test_it_is_well_formed_and_fetches_nothing(page: str) -> None:
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", page)
    for tag, name, value in read(page).attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset"):
            assert value.startswith("data:image/png;base64," if tag == "img" else "#run-")


def test_every_number_of_the_cells_stands_on_the_page_with_its_runs(study: dict[str, Any], page: str) -> None:
    text, unit = " ".join(read(page).texts), study["metric"]["unit"]
    for cell in study["cells"]:
        assert number(cell["mean"], unit) in text and between(cell, unit) in text
        for field in ("parameters", "flops", "seconds", "memory_mib", "rate_nats"):
            assert number(cell[field]) in text
        assert fine(cell["learning_rate"]) in text
        assert f'title="{", ".join(cell["runs"])}"' in page
    for run in study["runs"]:
        assert run["command"] in text and run["directory"] in text
        assert run["weights_sha256"] is None or run["weights_sha256"] in page
    for entry in study["comparisons"]:
        assert f"{signed(entry['difference'], unit)}" in text and between(entry, unit, sign=True) in text
    for entry in study["ratios"]:
        assert f"{fine(entry['ratio'])}×" in text and between(entry) in text
    assert study["provenance"]["command"] in text and study["answer"]["rule"] in text


def test_links_lead_to_runs(study: dict[str, Any], page: str) -> None:
    attributes = read(page).attributes
    targets = {value for _, name, value in attributes if name == "id"}
    links = {value[1:] for _, name, value in attributes if name == "href"}
    assert links <= targets and len({t for t in targets if t.startswith("run-")}) == len(study["runs"])


def test_charts_are_xml_with_finite_coordinates(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    for chart in charts:
        element = ElementTree.fromstring(chart)
        for part in element.iter():
            for name in ("d", "x", "y", "cx", "cy", "transform", "viewBox"):
                assert not re.search(r"nan|inf|None", part.get(name, "")), chart[:300]
        if "data-chart" in element.attrib:
            assert json.loads(element.attrib["data-chart"])["series"]


def test_marks_stay_inside_of_their_chart(page: str) -> None:
    for chart in re.findall(r'<svg class="chart".*?</svg>', page, flags=re.S):
        width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', chart)[0])
        for x, y in re.findall(r'transform="translate\((\S+) (\S+)\)', chart):
            assert -1 <= float(x) <= width + 1 and -1 <= float(y) <= height + 1


def test_hostile_names_are_text() -> None:
    text = json.dumps(full()).replace('"relu"', json.dumps(HOSTILE)).replace("grinning face", "<i onload=x>")
    hostile = json.loads(text)
    hostile["answer"]["headline"] = hostile["failures"][0]["error"] = hostile["runs"][0]["command"] = HOSTILE
    schema.check(hostile, "study_report/v1")
    page, markdown = render(hostile), study_markdown.render(hostile)
    reader = read(page)
    assert "<script>alert" not in page and any(HOSTILE in part for part in reader.texts)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert "<script>" not in markdown and "<b>" not in markdown
    columns = [re.sub(r"\\\|", "", line).count("|") for line in markdown.splitlines() if line.startswith("| ")]
    assert set(columns) <= {len(row) + 1 for row in ([""] * k for k in range(4, 15))}


def test_missing_parts_are_said_with_the_reason() -> None:
    page = render(minimal())
    assert "No run has finished yet." in page and "<figure" not in page
    for part, reason in missing(minimal()).items():
        assert str(escape(reason)) in page, part
    assert "a ratio needs at least two sizes, this study has one" in page
    assert missing(full() | {"ratios": []})["ratios"].startswith("no two arms have finished")
    assert set(missing(full())) == {"factorial"}


def test_unmeasured_targets_are_visible_with_the_reason() -> None:
    page = render(full())
    assert page.count("not measured") == 3 and "the canonical Inception weights are not on this machine" in page
    assert all(text in page for text in ("500M", "183M", "1.82 s", "1.12 s", "10.2 GB", "4.1 GB", "15.2", "≤15.0"))


def test_the_answer_comes_first(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    order = ["Size ratios", "Quality against cost", "Arms", "Paired differences", "Pictures", "Training", "Tuning"]
    assert headings[1:8] == order and headings[-2:] == ["Every run", "Provenance"]
    assert page.index("Decision rule") < page.index("<h2>Size ratios")


def test_a_crowd_is_shown_pair_by_pair() -> None:
    page = render(full(MANY))
    assert all(f"<h3>Beside {arm}</h3>" in page for arm in MANY[1:])
    assert "<h3>Beside" not in render(full())


def test_a_study_matched_by_another_cost_has_its_chart() -> None:
    timed = full()
    timed["axis"] = {"label": "seconds per image", "unit": "s"}
    for cell in timed["cells"]:
        cell["cost"] = cell["parameters"] / 1e8
    for ratio in timed["ratios"]:
        ratio["lines"] = [line | {"x": [x / 1e8 for x in line["x"]]} for line in ratio["lines"]]
    schema.check(timed, "study_report/v1")
    assert "Against seconds per image" in render(timed) and "line fit" in render(timed)


def test_markdown_has_every_row(study: dict[str, Any]) -> None:
    text, unit = study_markdown.render(study), study["metric"]["unit"]
    for cell in study["cells"]:
        assert number(cell["mean"], unit) in text and between(cell, unit) in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    parts = ("cells", "comparisons", "ratios", "tuning", "rate_distortion", "health", "failures", "runs")
    assert len(rows) >= sum(len(study[part]) for part in parts)
    assert study["answer"]["headline"].split()[0] in text[:400] and study["provenance"]["command"] in text


def test_files_are_written_and_read_again(tmp_path: Path) -> None:
    write_study_report(full(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == full()
    assert (tmp_path / "report.html").read_text() == render(full())
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "report.md"}
    with pytest.raises(UserError, match="no fid_report/v1"):
        schema.read(tmp_path)
    with pytest.raises(ValueError, match="warnings"):
        write_study_report({**full(), "warnings": None}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_rendering_leaves_the_report_as_it_was(study: dict[str, Any]) -> None:
    before = copy.deepcopy(study)
    render(study)
    study_markdown.render(study)
    assert study == before


def test_places_are_moved_apart_as_little_as_it_takes() -> None:
    assert apart([0, 100, 50], 10) == [0, 100, 50]
    assert apart([50, 50, 50], 10) == [40, 50, 60]
    moved = apart([50, 53, 58, 58, 90], 6)
    assert all(b - a >= 6 - 1e-9 for a, b in pairwise(moved)) and moved[-1] == 90


@pytest.mark.parametrize(("low", "high"), [(7e4, 9.6e5), (3e5, 4.5e5), (1e3, 1e9), (2e-4, 9e-3), (90, 110)])
def test_logarithmic_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(Axis(low, high, 0, 100, log=True))
    assert 1 <= len(ticks) <= 6 and all(low <= tick <= high for tick in ticks)


def test_unbounded_intervals_are_arrows() -> None:
    axis = Axis(0, 10, 0, 100)
    inside, open_ended, outside = (whisker(axis, 2, end, 5, upright=False, css="a0") for end in (8, None, math.inf))
    assert "M80 2L80 8" in inside and "M95 1.5L100 5L95 8.5" in open_ended and open_ended == outside


@needs_browser
@pytest.mark.parametrize("name", ["full", "minimal", "twelve arms"])
def test_a_browser_renders_it_without_network_or_complaint(name: str, tmp_path: Path) -> None:
    write_study_report(STUDIES[name](), tmp_path)
    page = tmp_path / "report.html"
    document, complaints = browse(page, "--dump-dom")
    assert complaints == [] and "Provenance" in document
    with Image.open(screenshot(page, 1280, 1600)) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert image.width == 1280 and colours is not None and len(colours) > 60
    assert overflow(page, 390) <= 0
