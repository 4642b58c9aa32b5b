"""The page of an evaluation by protocol, from its report alone, as a browser shows it."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from PIL import Image

from fluxflow_train.reports import markdown, schema
from fluxflow_train.reports.page import number, render
from tests.reports.browser import browse, needs_browser, overflow, screenshot


@pytest.fixture(scope="module")
def vae_report(evaluated_vae: Path) -> dict[str, Any]:
    return json.loads((evaluated_vae / "report.json").read_text())


@pytest.fixture(scope="module")
def flow_report(evaluated_flow: Path) -> dict[str, Any]:
    return json.loads((evaluated_flow / "report.json").read_text())


@pytest.fixture(params=["vae", "flow"])
def folder(request: Any, evaluated_vae: Path, evaluated_flow: Path, tmp_path: Path) -> Path:
    """Of an evaluation of either kind: a copy, so that the browser's files stay out of it."""
    copied = tmp_path / "evaluation"
    shutil.copytree(evaluated_vae if request.param == "vae" else evaluated_flow, copied)
    return copied


def test_the_page_shows_every_number(vae_report: dict[str, Any], flow_report: dict[str, Any]) -> None:
    for report in (vae_report, flow_report):
        page = render(report)
        for result in report["results"]:
            assert number(result["value"], result["unit"]) in page, result["name"]
        assert report["protocol"]["hash"] in page and report["model"]["weights_sha256"] in page
        assert all(str(escape(check["name"])) in page for check in report["checks"])


def test_what_each_kind_shows(vae_report: dict[str, Any], flow_report: dict[str, Any]) -> None:
    vae, flow = render(vae_report), render(flow_report)
    assert vae.count('alt="difference"') == 16 and "Guidance</h2>" not in vae
    assert "against 1/N" in vae or not vae_report["figures"]["frechet_by_size"]
    assert "Guidance</h2>" in flow and "Nearest training images" in flow and 'alt="difference"' not in flow
    assert "against guidance" in flow and "guidance 1 to 3" in flow


def test_an_untrusted_name_is_only_text(flow_report: dict[str, Any]) -> None:
    report = copy.deepcopy(flow_report)
    report["figures"]["captioned"][0]["caption"] = "<script>alert(1)</script>"
    assert "<script>alert" not in render(report)


def test_random_weights_are_no_fid_at_the_top_of_the_page(vae_report: dict[str, Any]) -> None:
    report = copy.deepcopy(vae_report)
    report["extractor"] |= {"random": True, "weights": None}
    report |= {"status": "smoke", "status_reasons": ["NOT AN FID: the extractor's weights are random"]}
    for text in (render(report), markdown.render(report)):
        assert "NOT AN FID" in text[: text.index("Results" if "<main>" in text else "| metric")]


@needs_browser
def test_a_browser_renders_it_without_network_or_complaint(folder: Path) -> None:
    page = folder / "report.html"
    document, complaints = browse(page, "--dump-dom")
    assert complaints == [] and "Provenance" in document
    for width in (1280, 600):
        with Image.open(screenshot(page, width, 1600)) as image:
            assert image.width == width
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
            assert colours is not None and len(colours) > 200  # text, charts and pictures, not a blank sheet
    assert overflow(page, 390) <= 0


@needs_browser
@pytest.mark.parametrize("fault", ['<img src="http://localhost/x.png">', "<script>missing()</script>"])
def test_the_browser_would_complain(folder: Path, fault: str) -> None:
    page = folder / "broken.html"
    page.write_text((folder / "report.html").read_text().replace("</main>", f"{fault}</main>"))
    assert browse(page, "--dump-dom")[1]


# ---- schema and Markdown ----


def test_reports_meet_the_schema_and_a_changed_one_does_not(flow_report: dict[str, Any]) -> None:
    schema.check(flow_report)
    for where, value in (
        (("schema",), "fid_report/v2"),
        (("status",), "good"),
        (("samples", "synced"), "many"),
        (("protocol", "hash"), "short"),
        (("results", 0, "value"), "0.1"),
        (("checks", 0, "passed"), None),
        (("extractor", "canonical"), "yes"),
        (("figures", "pareto"), ...),
        (("sweep",), ...),
    ):
        report = copy.deepcopy(flow_report)
        part: Any = report
        for key in where[:-1]:
            part = part[key]
        if value is ...:
            del part[where[-1]]
        else:
            part[where[-1]] = value
        with pytest.raises(ValueError, match=r"no fid_report/v1: at "):
            schema.check(report)


def test_a_final_report_has_no_failed_check(flow_report: dict[str, Any]) -> None:
    report = copy.deepcopy(flow_report) | {"status": "final", "status_reasons": []}
    schema.check(report)
    report["checks"][0]["passed"] = False
    with pytest.raises(ValueError, match="checks/0/passed"):
        schema.check(report)


def test_markdown_has_every_result_of_every_guidance(flow_report: dict[str, Any]) -> None:
    text = markdown.render(flow_report)
    assert "## Guidance 1" in text and "## Guidance 3" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "metric" not in line]
    assert len(rows) == len(flow_report["results"]) + sum(len(part["results"]) for part in flow_report["sweep"])
    assert all(line.count("|") == 5 for line in rows)
    assert flow_report["command"] in text
