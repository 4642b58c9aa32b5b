"""FSDP on two ranks: it starts, trains what DDP trains, saves, goes on, and exports; what it can't do is said."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
VAE = ("+experiment=vae_bezier", "evaluate.split=null")
Command = Callable[..., Any]


@pytest.fixture
def train(small: tuple[str, ...], data_root: Path, tmp_path: Path) -> Callable[..., str]:
    """`train("fsdp", options ...)` in processes of its own; what it said."""
    own = [option for option in small if not option.startswith("trainer=")]

    def run(strategy: str, *options: str, code: int = 0) -> str:
        typed = [*own, f"data.root={data_root}", *options, f"trainer={strategy}", *TWO, f"run={tmp_path / strategy}"]
        done = subprocess.run(
            [sys.executable, "-m", "fluxflow_train", *typed], capture_output=True, text=True, timeout=180
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def records(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and k != "train/images_per_second"} for row in rows]


def test_vae_as_with_ddp_and_on_from_its_checkpoint(train: Callable[..., str], tmp_path: Path) -> None:
    train("ddp", *VAE)
    train("fsdp", *VAE, "budget.hours=0.0001", code=85)
    assert "resuming at" in train("fsdp", *VAE)
    for ours, theirs in zip(records(tmp_path / "fsdp"), records(tmp_path / "ddp"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-7)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_flow(train: Callable[..., str], vae_run: Path, frozen_text: tuple[str, ...], tmp_path: Path) -> None:
    flow = ("+experiment=flow_bezier", f"vae={vae_run}", *frozen_text, "callbacks.samples.num_prompts=2")
    train("fsdp", *flow, "task.sampler.steps=2", "evaluate.split=null")
    assert len(list((tmp_path / "fsdp" / "samples").glob("*.png"))) == 2
    assert (tmp_path / "fsdp" / "model.safetensors").exists()


def test_gan_is_refused(train: Callable[..., str]) -> None:
    assert "error: trainer=fsdp trains one net" in train("fsdp", *VAE, "gan=patch", code=1)
