"""The batch scripts on a real cluster of two nodes: everything that can end a job before its time.

FLUXFLOW_REPEATS=10 repeats the test of SIGUSR1.
"""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import wait_for
from tests.slurm.conftest import IMAGES, Jobs, scalars, weights

pytestmark = pytest.mark.slurm


def assert_same(run: Path, undisturbed: Path) -> None:
    ours, theirs = weights(run), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert scalars(run) == scalars(undisturbed)


def test_two_nodes_train_one_run(jobs: Jobs, undisturbed: Path) -> None:
    state = torch.load(undisturbed / "checkpoints" / "last.ckpt", weights_only=True)["task"]
    assert state["images_seen"] == IMAGES
    assert len(state["meters"]) == 2  # ranks; a checkpoint is refused where their weights differ
    assert "2 x cpu" in jobs.cluster.log()
    assert (undisturbed / "model.safetensors").exists()


@pytest.mark.parametrize("repetition", range(int(os.environ.get("FLUXFLOW_REPEATS", "1"))))
def test_sigusr1(jobs: Jobs, undisturbed: Path, tmp_path: Path, repetition: int) -> None:
    run = tmp_path / "run"
    job = jobs.train(run)
    jobs.wait_for_records(run, 4 + repetition, job)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    done = jobs.completed(job)
    assert done["Restarts"] == "1", jobs.cluster.log()
    assert_same(run, undisturbed)
    (log,) = jobs.cluster.folder.glob(f"job-{job}.out")
    assert re.search(r"stopped by SIGUSR1 at [\d,]+ of 1,920 images, saved", log.read_text())
    assert re.search(r"resuming at [\d,]+ images", log.read_text())


def test_signal_during_the_imports(jobs: Jobs, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.train(run)
    wait_for(lambda: "0" in jobs.cluster.run("squeue", "-h", "-s", "-j", job), 30, "the step", jobs.cluster.log)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    assert jobs.completed(job)["Restarts"] == "1"
    assert_same(run, undisturbed)


def test_time_limit(jobs: Jobs, undisturbed: Path, tmp_path: Path) -> None:
    """SLURM looks every 30 s whether a signal is due; until it has, the training stands still, fast as it may be."""
    run = tmp_path / "run"
    job = jobs.train(run, "--time=1", "--signal=SIGUSR1@15")
    jobs.wait_for_records(run, 4, job)
    jobs.cluster.run("scancel", "--signal=STOP", job)
    wait_for(lambda: signal_waits(run) or jobs.cluster.show(job)["Restarts"] != "0", 50, "SIGUSR1", jobs.cluster.log)
    jobs.cluster.run("scancel", "--signal=CONT", job)
    done = jobs.completed(job)
    assert int(done["Restarts"]) >= 1
    assert_same(run, undisturbed)
    (log,) = jobs.cluster.folder.glob(f"job-{job}.out")
    assert "stopped by SIGUSR1" in log.read_text()


def signal_waits(run: Path) -> bool:
    """Whether SIGUSR1 is pending for a (stopped) process of the run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"run={run}".encode() not in (process / "cmdline").read_bytes().split(b"\0"):
                continue
            pending = re.search(r"^ShdPnd:\s*(\w+)", (process / "status").read_text(), re.MULTILINE)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if pending and int(pending[1], 16) & 1 << (signal.SIGUSR1 - 1):
            return True
    return False


def test_preemption_by_another_partition(jobs: Jobs, undisturbed: Path, tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    job = jobs.train(run)
    jobs.wait_for_records(run, 4, job)
    urgent = jobs.cluster.submit(
        script, options=("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out")
    )
    jobs.cluster.wait_until(urgent, "COMPLETED", timeout=90)
    assert jobs.completed(job)["Restarts"] == "1", jobs.cluster.log()
    assert_same(run, undisturbed)
    (log,) = jobs.cluster.folder.glob(f"job-{job}.out")
    assert "stopped by SIGTERM" in log.read_text()


def test_scontrol_requeue(jobs: Jobs, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.train(run)
    jobs.wait_for_records(run, 4, job)
    jobs.cluster.run("scontrol", "requeue", job)
    assert jobs.completed(job)["Restarts"] == "1"
    assert_same(run, undisturbed)


def test_requeues_have_a_cap(jobs: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.train(run, FLUXFLOW_MAX_REQUEUES="0")
    jobs.wait_for_records(run, 2, job)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    done = jobs.cluster.wait_until(job, "FAILED", timeout=60)
    assert done["ExitCode"] == "85:0"


def test_a_mistake_is_not_requeued(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.train(tmp_path / "run", "--export=ALL", FLUXFLOW_ENV="/nowhere")
    assert jobs.cluster.wait_until(job, "FAILED", timeout=60)["ExitCode"] == "1:0"
    assert "no /nowhere/bin/activate" in jobs.cluster.log()
