"""A run from beginning to end, resumed, damaged, refused: as a person meets it."""

import csv
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxflow_train.errors import UserError

REPOSITORY = Path(__file__).parent.parent


Command = Callable[..., Any]
GAN = ("+experiment=vae_bezier", "gan=patch")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="session")
def options(small: tuple[str, ...], data_root: Path) -> tuple[str, ...]:
    return (*GAN, *small, f"data.root={data_root}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, options: tuple[str, ...]) -> Path:
    """A whole GAN run with its report, by the command itself."""
    run = tmp_path_factory.mktemp("runs") / "gan"
    typed = [sys.executable, "-m", "fluxflow_train", *options, f"run={run}"]
    result = subprocess.run(typed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return run


def test_run_directory_keeps_its_contract(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "overrides.txt",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model.safetensors",
        "model.json",
        "metrics.csv",
        "health.json",
        "samples/images_000000032.png",
        "report.json",
        "report.html",
    }
    assert not [name for name in names if name.endswith(".tmp")]


def test_report_has_the_headline_results(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    values = {entry["name"]: entry["value"] for entry in report["results"]}
    assert {"psnr", "psnr_nonwhite", "ssim", "rate_nats", "psnr_pca", "psnr_white"} <= set(values)
    assert report["status"] == "partial"  # 12 images are too few for more


def test_every_scalar_is_recorded_against_images(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    seen = [int(row["images_seen"]) for row in rows]
    assert seen == sorted(seen)
    assert seen[-1] == 32
    assert {"train/loss", "train/loss_disc", "train/gan_weight", "train/rate_nats", "val/psnr"} <= set(rows[0])


def test_finished_run_resumes_to_nothing_new(finished: Path, command: Command) -> None:
    before = (finished / "metrics.csv").read_text(), weights(finished)
    assert command("fluxflow_train", f"run={finished}").code == 0
    assert (finished / "metrics.csv").read_text() == before[0]
    assert all(torch.equal(weights(finished)[name], before[1][name]) for name in before[1])


def test_another_run_in_its_place_is_refused(finished: Path, options: tuple[str, ...], command: Command) -> None:
    code, output = command("fluxflow_train", *options, f"run={finished}", "seed=1")
    assert code == 1
    assert "seed=1 (the run has 0)" in output


def test_moved_run_falls_back_from_a_truncated_checkpoint(finished: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "moved"
    shutil.copytree(finished, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged"):
        assert command("fluxflow_train", f"run={run}").code == 0
    assert all(torch.equal(weights(run)[name], weights(finished)[name]) for name in weights(finished))

    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        code, output = command("fluxflow_train", f"run={run}")
    assert code == 1
    assert output.splitlines()[-1].startswith("error: no checkpoint in")


def test_wandb_works_offline(tmp_path: Path, options: tuple[str, ...], command: Command) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    more = ("logger=wandb", "logger.wandb.offline=true", "budget.images=8", "evaluate.split=null")
    assert command("fluxflow_train", *options, *more, f"run={run}").code == 0
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert (run / "metrics.csv").exists()


def test_evaluate_measures_again(finished: Path, command: Command) -> None:
    (finished / "report.json").unlink()
    assert command("fluxflow_train.evaluate", f"run={finished}", "split=tune").code == 0
    assert json.loads((finished / "report.json").read_text())["reference"]["split"] == "tune"


def test_damaged_export_and_foreign_code_are_refused(finished: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    description = json.loads((run / "model.json").read_text())
    description["architecture"]["_target_"] = "os.system"
    (run / "model.json").write_text(json.dumps(description))
    code, output = command("fluxflow_train.evaluate", f"run={run}")
    assert code == 1
    assert "os.system" in output
    (run / "model.json").write_bytes((finished / "model.json").read_bytes())
    (run / "model.safetensors").write_bytes(b"short")
    code, output = command("fluxflow_train.evaluate", f"run={run}")
    assert code == 1
    assert "damaged" in output


def test_full_disk_is_answered_and_nothing_is_lost(tmp_path: Path, options: tuple[str, ...], command: Command) -> None:
    """A limit on the size of files stands for the full disk: the second session stops at its first checkpoint."""
    run = tmp_path / "run"
    halfway = "task.budget_images=32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxflow_train.callbacks.checkpoint.Checkpoint.on_validation_end", stop_here)
        assert command("fluxflow_train", *options, halfway, f"run={run}").code == 1
    kept = (run / "checkpoints" / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code, output = command("fluxflow_train", f"run={run}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: cannot write")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == kept
    assert command("fluxflow_train", f"run={run}").code == 0


def stop_here(*_: Any) -> None:
    raise UserError("stopped by the test")


def test_place_that_is_no_folder_is_answered(tmp_path: Path, options: tuple[str, ...], command: Command) -> None:
    (tmp_path / "file").write_text("")
    code, output = command("fluxflow_train", *options, f"run={tmp_path / 'file' / 'run'}")
    assert code == 1
    assert output.splitlines()[-1].startswith("error: cannot write")
