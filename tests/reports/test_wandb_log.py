"""A report in a W&B run, without network."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.wandb_log import log_report, numbers

pytest.importorskip("wandb")


def test_an_offline_run_holds_the_numbers_the_page_and_the_files(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_report(report, tmp_path)
    settings = OmegaConf.create({"project": "p", "name": "n", "group": "g", "id": "abc", "offline": True})
    log_report(report, tmp_path, settings)
    [folder] = (tmp_path / "wandb").glob("offline-run-*-abc")
    [records] = folder.glob("run-abc.wandb")
    data = records.read_bytes()
    for name in ("vae-reconstruction/v1/psnr", "vae-reconstruction/v1/status", "vae-reconstruction/v1/report"):
        assert name.encode() in data
    assert list(folder.rglob("report_*.html")) and list(folder.rglob("*.png"))
    assert b"report.json" in data and b"report.md" in data


def test_every_value_has_a_name(report: dict[str, Any]) -> None:
    found = numbers(report | {"sweep": [{"guidance": 3.0, "results": report["results"]}]})
    values = [entry for entry in report["results"] if entry["raw"] is not None]
    assert len(found) == 1 + 2 * len(values)
    assert found["vae-reconstruction/v1/psnr/guidance-3"] == found["vae-reconstruction/v1/psnr"]
    json.dumps(found, allow_nan=False)
