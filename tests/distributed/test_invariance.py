"""The same run on 1, 2 and 4 ranks, and in micro batches: the same samples, losses, gradients and metrics."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.slurm.cluster import free_ports

PROGRAM = Path(__file__).parent / "ranks.py"
WORLDS = (1, 2, 4)
STEPS = 50
GAN = ("+experiment=vae_bezier", "gan=patch", "task.adversary.disc_start=0", "task.adversary.gan_start=0")
GAN += ("task.kl_weight=0.01", "task.kl_warmup=0", "task.free_bits=2.8", "task.adversary.r1_every=2")
FLOW = ("+experiment=flow_bezier", "callbacks.samples.prompts=[]", "task.sampler.steps=1")
FLOW += ("task.cfg_dropout_prob=0.3",)


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory,
    small: tuple[str, ...],
    data_root: Path,
    vae_run: Path,
    frozen_text: tuple[str, ...],
) -> Callable[[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("invariance")
    trained = [option for option in small if not option.startswith("trainer=")]
    shared = [*trained, f"data.root={data_root}", "scale.batch_size=8", "scale.log_every=8", "trainer=ddp"]
    shared += ["trainer.accelerator=cpu", "scale.validate_every=200", "scale.samples_every=200"]
    vae, flow = [*GAN, *shared], [*FLOW, *shared, *frozen_text, f"vae={vae_run}"]
    one, many = ["budget.images=8"], [f"budget.images={8 * STEPS}", "trainer.precision=64-true"]
    cases = {
        "vae-first": {"overrides": [*vae, *one], "worlds": WORLDS, "nets": 2},
        "flow-first": {"overrides": [*flow, *one], "worlds": WORLDS, "nets": 1},
        "vae-long": {"overrides": [*vae, *many], "worlds": WORLDS, "nets": 0},
        "flow-long": {"overrides": [*flow, *many], "worlds": WORLDS, "nets": 0},
        "vae-parts": {"overrides": [*vae, *many, "task.num_micro_batches=2"], "worlds": [1, 2], "nets": 0},
        "flow-parts": {"overrides": [*flow, *many, "task.num_micro_batches=2"], "worlds": [2], "nets": 0},
    }
    ports = dict(zip(WORLDS, free_ports(len(WORLDS)), strict=True))
    (folder / "cases.json").write_text(json.dumps({"cases": cases, "ports": ports}))
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda name, world: torch.load(folder / f"{name}-{world}.pt", weights_only=True)


def close(ours: list[tuple[int, dict]], theirs: list[tuple[int, dict]], relative: float) -> None:
    """Every recorded scalar but the clock, at every record."""
    assert [at for at, _ in ours] == [at for at, _ in theirs]
    for (at, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"train/images_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=relative, abs=1e-12), (at, name)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("task", ["vae", "flow"])
def test_first_step(seen: Callable[..., Any], task: str, world: int) -> None:
    """In fp32: losses and reduced gradients, of D as well as of the VAE."""
    ours, theirs = seen(f"{task}-first", world), seen(f"{task}-first", 1)
    close(ours["records"][:1], theirs["records"][:1], relative=1e-6)
    assert len(ours["gradients"]) == (2 if task == "vae" else 1)
    for mine, other in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert mine.keys() == other.keys()
        a, b = (torch.cat([g[name].double().flatten() for name in mine]) for g in (mine, other))
        assert (a - b).norm() / b.norm() < 1e-6


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("task", ["vae", "flow"])
def test_fifty_steps_in_float64(seen: Callable[..., Any], task: str, world: int) -> None:
    ours, theirs = seen(f"{task}-long", world)["records"], seen(f"{task}-long", 1)["records"]
    assert len([1 for _, values in ours if "train/loss" in values]) == STEPS
    assert any(f"val/{name}" in values for _, values in ours for name in ("psnr", "loss"))
    close(ours, theirs, relative=1e-9)


@pytest.mark.parametrize(("task", "world"), [("vae", 1), ("vae", 2), ("flow", 2)])
def test_fifty_steps_in_micro_batches(seen: Callable[..., Any], task: str, world: int) -> None:
    """The adaptive weight and the free bits are of the whole batch, not of its parts."""
    ours, theirs = seen(f"{task}-parts", world), seen(f"{task}-long", 1)
    close(ours["records"], theirs["records"], relative=1e-9)


def test_free_bits_and_adaptive_weight_are_at_work(seen: Callable[..., Any]) -> None:
    """Else the tests above could not fail: some channels are charged and some are not, and the weight moves."""
    records = [values for _, values in seen("vae-long", 1)["records"] if "train/gan_weight" in values]
    assert len({round(values["train/gan_weight"], 6) for values in records}) > STEPS // 2
    num_channels = len(seen("vae-long", 1)["charged"][0])
    assert any(0 < sum(charged) < num_channels for charged in seen("vae-long", 1)["charged"])
