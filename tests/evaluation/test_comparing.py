"""`python -m fluxflow_train.report runs=[A,B]`: a table of what compares; else the field that differs."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxflow_train.reports.compare import MUST_AGREE, difference, table

Command = Callable[..., Any]
REPORT = "fluxflow_train.report"


@pytest.fixture(scope="module")
def report(evaluated_vae: Path) -> dict[str, Any]:
    return json.loads((evaluated_vae / "report.json").read_text())


def changed(report: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    other = copy.deepcopy(report)
    part = other
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return other


def test_two_runs_by_one_protocol_stand_side_by_side(
    command: Command, evaluated_vae: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "evaluations" / evaluated_vae.name
    other.mkdir(parents=True)
    better = copy.deepcopy(report)
    entry = next(entry for entry in better["results"] if entry["name"] == "psnr")
    entry["raw"] = entry["value"] = entry["raw"] + 1
    (other / "report.json").write_text(json.dumps(better))
    a, b, out = evaluated_vae.parent.parent, tmp_path / "other", tmp_path / "table.md"
    done = command(REPORT, f"runs=[{a},{b}]", "protocol=shapes-colours", f"out={out}")
    assert done.code == 0, done.output
    assert out.read_text() == done.output
    [row] = [line for line in done.output.splitlines() if line.startswith("| PSNR, dB")]
    first, second = row.strip("| ").split(" | ")[1:]
    assert f"**{entry['raw']:.5g}**" in second and "**" not in first
    lines = done.output.splitlines()
    assert all(line.count("|") == 4 for line in lines) and len(lines) == 3 + 3 + len(report["results"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("protocol", "hash"), "0" * 64),
        (("protocol", "resolution"), 64),
        (("extractor", "weights_sha256"), "1" * 64),
        (("extractor", "resizer"), "clean"),
        (("samples", "synced"), 47),
        (("samples", "list_sha256"), "2" * 64),
        (("samples", "seed"), 1),
        (("reference", "list_sha256"), "3" * 64),
        (("estimator", "paired"), "Manhattan"),
    ],
)
def test_unlike_reports_are_refused_by_name(
    command: Command, evaluated_vae: Path, report: dict[str, Any], tmp_path: Path, path: tuple[str, ...], value: Any
) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(changed(report, path, value)))
    done = command(REPORT, f"runs=[{evaluated_vae},{file}]")
    assert done.code == 1 and done.output.count("\n") == 1
    named = ".".join(path[:1] if path[0] == "estimator" else path)
    assert f"do not compare: {named} is " in done.output, done.output


def test_rounding_of_another_machine_is_no_difference(report: dict[str, Any]) -> None:
    prints = report["extractor"]["fingerprint"]
    assert difference(report, changed(report, ("extractor", "fingerprint"), [v * 1.00001 for v in prints])) == ""
    apart = difference(report, changed(report, ("extractor", "fingerprint"), [v + 0.01 for v in prints]))
    assert apart.startswith("extractor.fingerprint differs")
    assert difference(report, changed(report, ("model", "weights_sha256"), "0" * 64)) == ""


def test_another_machine_is_no_difference(report: dict[str, Any]) -> None:
    other = changed(report, ("environment", "world_size"), 8)
    assert difference(report, changed(other, ("cost",), {"seconds": 1.0})) == ""


def test_the_fields_are_those_of_real_reports(report: dict[str, Any], evaluated_flow: Path) -> None:
    """A field that no report has would never refuse anything."""
    flow = json.loads((evaluated_flow / "report.json").read_text())
    own = {("protocol", "image_size"), ("samples", "drawn"), ("reference", "keys_sha256")}  # of runs' own reports
    for path in MUST_AGREE:
        assert path in own or all(path[-1] in (r if len(path) == 1 else r[path[0]]) for r in (report, flow)), path


def test_a_vae_and_a_flow_do_not_compare(command: Command, evaluated_vae: Path, evaluated_flow: Path) -> None:
    done = command(REPORT, f"runs=[{evaluated_vae},{evaluated_flow}]")
    assert done.code == 1 and "do not compare" in done.output


def test_what_can_be_put_right(command: Command, evaluated_vae: Path, tmp_path: Path) -> None:
    run = evaluated_vae.parent.parent
    two = tmp_path / "two"
    for name in ("a", "b"):
        shutil.copytree(evaluated_vae, two / "evaluations" / name)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for runs, said in (
        (f"[{run}]", "two runs or more"),
        (f"[{run},{tmp_path / 'none'}]", "there is no report in"),
        (f"[{run},{two}]", "there are 2 reports in"),
        (f"[{run},{broken}]", "is damaged"),
    ):
        done = command(REPORT, f"runs={runs}")
        assert done.code == 1 and said in done.output and done.output.count("\n") == 1, done.output
    done = command(REPORT, f"runs=[{run},{run}]", "protocol=openmoji-test")
    assert done.code == 1 and "there is no evaluation by openmoji-test" in done.output


def test_a_run_without_a_value_has_a_dash(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["results"] = [entry for entry in other["results"] if entry["name"] != "psnr"]
    [row] = [line for line in table(["a", "b"], [report, other]).splitlines() if line.startswith("| PSNR, dB")]
    assert row.endswith(" – |") and "**" not in row
