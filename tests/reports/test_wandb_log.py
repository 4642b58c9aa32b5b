"""A run and its report in W&B, without network: what an offline run's file holds is what `wandb sync` sends later."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fluxflow_train.records import WandbRecords
from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.wandb_log import log_report, numbers

pytest.importorskip("wandb")

import wandb
from wandb.proto import wandb_internal_pb2

TAGS = ["study:vae_size", "arm:bezier", "size:s", "seed:3"]
LABELS = {"study": "vae_size", "arm": "bezier", "size": "s", "seed": 3, "network_flops": 1.5e8}
BLOCK, HEADER = 2**15, 7


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a study's run in `tmp_path`, as `logger.wandb` of its configuration."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.yaml").write_text("run: null\nseed: 3\nscale: {name: tiny}\nwhere: ${run}/samples\n")
    names = {"project": "p", "name": "main/bezier-s-seed3", "group": "vae_size", "id": "abc", "job_type": "main"}
    return {**names, "save_dir": str(tmp_path), "offline": False, "tags": TAGS, "labels": LABELS}


def records(folder: Path) -> Iterator[Any]:
    """Of a `.wandb` file: LevelDB's log format, a seven-byte head, then protobuf messages in blocks of 32 KiB."""
    [path] = folder.glob("run-*.wandb")
    data, position, message = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the end of a block is left empty
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole message, or the last part of one
            yield wandb_internal_pb2.Record.FromString(message)  # type: ignore[attr-defined]
            message = b""


def values(items: Any) -> dict[str, Any]:
    """Of what has parts, such as a picture, the last one."""
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def contents(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The run as it was begun, its config, its summary, and what it logged, once the other process has written all."""
    run, config, summary, history = None, {}, {}, []
    for _ in range(300):
        if any(record.HasField("exit") for record in records(folder)):
            break
        time.sleep(0.1)
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = run or record.run
            config |= values(record.run.config.update)
        elif kind == "config":
            config |= values(record.config.update)
        elif kind == "summary":
            summary |= values(record.summary.update)
        elif kind == "history":
            history.append(values(record.history.item))
    return run, config, summary, history


def check_names(run: Any, config: dict[str, Any], folder: Path) -> None:
    """Whatever W&B finds and groups the run by."""
    assert (run.run_id, run.display_name, run.run_group, run.job_type, list(run.tags)) == (
        "abc",
        "main/bezier-s-seed3",
        "vae_size",
        "main",
        TAGS,
    )
    assert {key: config[key] for key in LABELS} == LABELS
    assert config["scale"] == {"name": "tiny"} and config["where"] == f"{folder}/samples"


def test_an_offline_run_holds_names_config_curves_and_the_report(
    report: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    wandb.init(project="p", id="another", dir=tmp_path, mode="offline")  # a run that this process has not ended
    logger = WandbRecords(**settings)
    for seen in (8.0, 16.0):
        logger.log_metrics({"images_seen": seen, "val/psnr": seen / 2, "health/dead": 0.0}, step=int(seen))
    write_report(report, tmp_path)
    log_report(report, tmp_path, OmegaConf.create(settings | {"_target_": "x"}))
    [folder] = (tmp_path / "wandb").glob("offline-run-*-abc")
    run, config, summary, history = contents(folder)
    check_names(run, config, tmp_path)
    logged = [(row["images_seen"], row["val/psnr"]) for row in history if "val/psnr" in row]
    assert logged == [(8.0, 4.0), (16.0, 8.0)]
    assert {key: summary[key] for key in numbers(report)} == numbers(report)
    axes = {r.metric.glob_name: r.metric.step_metric for r in records(folder) if r.HasField("metric")}
    assert axes["*"] == "images_seen"


def test_a_report_made_later_goes_on_with_the_run_under_the_same_names(
    report: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    write_report(report, tmp_path)
    log_report(report, tmp_path, OmegaConf.create(settings | {"_target_": "x"}))
    [folder] = (tmp_path / "wandb").glob("offline-run-*-abc")
    run, config, summary, history = contents(folder)
    check_names(run, config, tmp_path)
    assert summary["vae-reconstruction/v1/status"] == report["status"]
    assert {"vae-reconstruction/v1/report", "vae-reconstruction/v1/pictures"} <= {key for row in history for key in row}
    assert list(folder.rglob("report_*.html")) and list(folder.rglob("*.png"))
    data = next(folder.glob("*.wandb")).read_bytes()
    assert b"report.json" in data and b"report.md" in data


def test_every_value_has_a_name(report: dict[str, Any]) -> None:
    found = numbers(report | {"sweep": [{"guidance": 3.0, "results": report["results"]}]})
    values = [entry for entry in report["results"] if entry["raw"] is not None]
    assert len(found) == 1 + 2 * len(values)
    assert found["vae-reconstruction/v1/psnr/guidance-3"] == found["vae-reconstruction/v1/psnr"]
    json.dumps(found, allow_nan=False)
