from pathlib import Path

import pytest

from fluxflow_train.errors import UserError
from fluxflow_train.records import CSVRecords, WandbRecords, read


def test_columns_grow_and_empty_means_not_recorded(tmp_path: Path) -> None:
    records = CSVRecords(str(tmp_path))
    records.log_metrics({"images_seen": 8.0, "train/loss": 0.5})
    records.log_metrics({"images_seen": 8.0, "val/psnr": 20.0})
    records.log_metrics({"images_seen": 16.0, "train/loss": 0.25})
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "images_seen,train/loss,val/psnr\n8,0.5,\n8,,20\n16,0.25,\n"


def test_resume_drops_what_will_be_recorded_again(tmp_path: Path) -> None:
    records = CSVRecords(str(tmp_path))
    for seen in (8.0, 16.0, 24.0):
        records.log_metrics({"images_seen": seen, "train/loss": seen})
    resumed = CSVRecords(str(tmp_path))
    resumed.drop_after(16)
    resumed.log_metrics({"images_seen": 24.0, "train/loss": 1.0})
    columns, rows = read(tmp_path / "metrics.csv")
    assert columns == ["images_seen", "train/loss"]
    assert [row["images_seen"] for row in rows] == ["8", "16", "24"]
    assert rows[-1]["train/loss"] == "1"


def test_row_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    records = CSVRecords(str(tmp_path))
    records.log_metrics({"images_seen": 8.0, "a": 1.0, "b": 2.0})
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "16,3")
    resumed = CSVRecords(str(tmp_path))
    assert [row["images_seen"] for row in resumed.rows] == ["8"]
    resumed.drop_after(8)
    resumed.log_metrics({"images_seen": 16.0, "a": 3.0, "b": 4.0})
    assert path.read_text() == "images_seen,a,b\n8,1,2\n16,3,4\n"


def test_without_wandb_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"pip install \"fluxflow-train\[wandb\]\""):
        WandbRecords("p", "n", "g", "id", str(tmp_path), offline=True, job_type="train", tags=[], labels={})
