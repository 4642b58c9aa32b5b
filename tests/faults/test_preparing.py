"""What is made before and after training: shards, latents, evaluations, killed while they are written."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.evaluation.conftest import CONTENT
from tests.faults.conftest import Runs, until

pytestmark = pytest.mark.faults


def test_killed_while_shards_are_written(runs: Runs) -> None:
    options = ("data=shapes", "data.num_train=1500", "data.num_tune=8", "data.num_test=8", "scale.resolution=64")
    roots = runs.folder / "killed", runs.folder / "undisturbed"
    for root in roots:
        if root.name == "killed":
            for _ in range(2):
                process = runs.start("fluxflow_train.prepare", *options, f"data.root={root}")
                until(lambda root=root: list(root.glob(".shapes-*.tmp/*")) or list(root.glob(".shapes-*.tmp")), process)
                time.sleep(0.3)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert runs.finish(runs.start("fluxflow_train.prepare", *options, f"data.root={root}")).code == 0
    ours, theirs = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.tar")} for root in roots
    )
    assert ours == theirs
    assert not [path for path in roots[0].iterdir() if path.name.startswith(".shapes")]


def test_killed_while_latents_are_written(runs: Runs, vae_run: Path, frozen_text: tuple[str, ...]) -> None:
    options = ("data=shapes", "data.num_train=4000", "data.num_tune=8", "data.num_test=8", "scale.resolution=32")
    options += (*frozen_text, f"vae={vae_run}", "latents_device=cpu")
    hashes = []
    for name in ("killed", "undisturbed"):
        root = runs.folder / name
        if name == "killed":
            process = runs.start("fluxflow_train.prepare", *options, f"data.root={root}")
            until(lambda root=root: list(root.glob("latents-*/train/*.safetensors")), process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert runs.finish(runs.start("fluxflow_train.prepare", *options, f"data.root={root}")).code == 0
        files = sorted(root.glob("latents-*/*/*.safetensors"))
        hashes.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert hashes[0] == hashes[1] and hashes[0]


def test_killed_while_evaluating(runs: Runs, vae_run: Path) -> None:
    protocol = runs.folder / "protocol.yaml"
    protocol.write_text(yaml.safe_dump(CONTENT))
    reports = []
    for name in ("undisturbed", "killed"):
        run = runs.folder / name
        shutil.copytree(vae_run, run)
        words = (f"run={run}", f"protocol={protocol}", "device=cpu", f"data.root={runs.folder / 'data'}-{name}")
        for moment in (0.0, 1.0, 2.0) if name == "killed" else ():
            process = runs.start("fluxflow_train.evaluate", *words)
            until(lambda run=run: (run / "evaluations").exists(), process)
            time.sleep(moment)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended = runs.finish(runs.start("fluxflow_train.evaluate", *words))
        assert ended.code == 0, ended.output
        (report,) = run.glob("evaluations/*/report.json")
        results = json.loads(report.read_text())["results"]
        reports.append({entry["name"]: entry["value"] for entry in results if "seconds" not in entry["name"]})
    assert reports[0] == reports[1]
