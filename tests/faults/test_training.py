"""What ends a training before its time, or comes between it and its files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Runs, assert_same, mount, records, until, weights

pytestmark = pytest.mark.faults
REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("task", "workers", "kills"), [("vae", 2, 3), pytest.param("flow", 0, 3, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments(task: str, workers: int, kills: int) -> None:
    script = REPOSITORY / "scripts" / "kill_test.py"
    command = [sys.executable, script, "--task", task, "--kills", str(kills), "--workers", str(workers)]
    done = subprocess.run([*command, "--images", "800"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differences" in done.stdout


def test_killed_while_a_checkpoint_is_written(runs: Runs, reference: Path) -> None:
    run = runs.folder / "run"
    checkpoints = run / "checkpoints"
    for _ in range(3):
        process = runs.train(run)
        until(lambda: (checkpoints / ".last.ckpt.tmp").exists(), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    runs.complete(run)
    assert_same(run, reference)


@pytest.mark.parametrize("damage", ["cut short", "one bit flipped", "empty"])
def test_damaged_checkpoint(runs: Runs, reference: Path, halfway: Path, damage: str) -> None:
    run = runs.folder / "run"
    shutil.copytree(halfway, run)
    last = run / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    if damage == "one bit flipped":
        data[len(data) // 2] ^= 4
    last.write_bytes({"cut short": data[:5000], "empty": b""}.get(damage, data))
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged"):
        output = runs.complete(run)
    assert "resuming at" in output and "previous.ckpt" in output
    assert_same(run, reference)


def test_clock_that_jumps(runs: Runs, reference: Path, halfway: Path) -> None:
    """Files from 1980 and 2100: which checkpoint is the newest is no question of the clock."""
    run = runs.folder / "run"
    shutil.copytree(halfway, run)
    for path, year in (("last.ckpt", 1980), ("previous.ckpt", 2100)):
        moment = (year - 1970) * 365 * 24 * 3600
        os.utime(run / "checkpoints" / path, (moment, moment))
    runs.complete(run)
    assert_same(run, reference)


def test_workers_end_with_a_process_that_is_killed(runs: Runs, reference: Path) -> None:
    """Not all at once by their group, as the tests above: a worker that hands over a batch would wait for ever."""
    run = runs.folder / "run"
    process = runs.train(run)
    until(lambda: records(run) > 3, process)
    workers = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert workers
    runs.complete(run)
    assert_same(run, reference)


def test_data_worker_killed(runs: Runs, reference: Path) -> None:
    run = runs.folder / "run"
    process = runs.train(run)
    until(lambda: records(run) > 3, process)
    worker = children(process.pid)[0]
    os.kill(worker, signal.SIGKILL)
    ended = runs.finish(process)
    assert ended.code == 1
    assert "error: a data worker died" in ended.output and "Traceback" not in ended.output
    runs.complete(run)
    assert_same(run, reference)


def test_signal_to_every_process(runs: Runs, reference: Path) -> None:
    """SLURM sends its signals to the workers as well."""
    run = runs.folder / "run"
    process = runs.train(run)
    until(lambda: records(run) > 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    ended = runs.finish(process)
    assert ended.code == 85 and "stopped by SIGTERM at" in ended.output
    runs.complete(run)
    assert_same(run, reference)


def test_hours_are_over(runs: Runs, reference: Path) -> None:
    run = runs.folder / "run"
    ended = runs.finish(runs.train(run, "budget.hours=0.0001"))
    assert ended.code == 85 and "stopped by budget.hours=0.0001 at 8 of 960 images" in ended.output
    runs.complete(run)
    assert_same(run, reference)


def test_two_jobs_in_one_run_directory(runs: Runs, reference: Path) -> None:
    run = runs.folder / "run"
    first = runs.train(run)
    until(lambda: records(run) > 3, first)
    second = runs.train(run)
    assert second.wait(60) == 1
    assert f"is being trained by process {first.pid} on" in runs.output()
    assert runs.finish(first).code == 0
    assert_same(run, reference)


def test_full_disk(runs: Runs, reference: Path, halfway: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(halfway, run)
    kept = weights(run)
    used = int(subprocess.run(["du", "-sk", small_disk], capture_output=True, text=True).stdout.split()[0])
    assert mount("-o", f"remount,size={used + 40}k", str(small_disk)) == 0
    ended = runs.finish(runs.train(run))
    assert ended.code == 1
    assert "error: cannot write" in ended.output and "No space left" in ended.output
    assert weights(run).keys() == kept.keys()
    assert mount("-o", "remount,size=64m", str(small_disk)) == 0
    runs.complete(run)
    assert_same(run, reference)


def test_disk_that_becomes_read_only(runs: Runs, reference: Path, halfway: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(halfway, run)
    assert mount("-o", "remount,ro", str(small_disk)) == 0
    ended = runs.finish(runs.train(run))
    assert ended.code == 1 and "error: cannot write" in ended.output
    assert mount("-o", "remount,rw", str(small_disk)) == 0
    runs.complete(run)
    assert_same(run, reference)


# ---- ranks ----


def test_rank_killed(runs: Runs) -> None:
    """The first rank learns of the second's end; the run goes on afterwards, on one rank, with the same samples."""
    run = runs.folder / "run"
    process = runs.train(run, "trainer=ddp_cpu2", "trainer.precision=32-true", "data.num_workers=0")
    until(lambda: (run / "checkpoints" / "last.ckpt").exists(), process)
    (rank,) = [pid for pid in children(process.pid) if "fluxflow_train" in command(pid)]
    os.kill(rank, signal.SIGKILL)
    started = time.monotonic()
    ended = runs.finish(process)
    assert time.monotonic() - started < 30
    assert ended.code not in (0, 85)
    assert "another rank stopped" in ended.output or "terminated with code -9" in ended.output
    output = runs.complete(run)
    assert "the run had 2 ranks x 1 micro batches and now has 1 x 1" in output


def test_first_rank_killed(runs: Runs) -> None:
    run = runs.folder / "run"
    process = runs.train(run, "trainer=ddp_cpu2", "trainer.precision=32-true", "data.num_workers=0")
    until(lambda: records(run) > 3, process)
    (rank,) = [pid for pid in children(process.pid) if "fluxflow_train" in command(pid)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the other rank hangs"
        time.sleep(0.1)
    assert "another rank stopped" in runs.output()


def test_signal_to_one_rank(runs: Runs) -> None:
    """Both end at the same batch, with a checkpoint, and two ranks go on from it."""
    run, undisturbed = runs.folder / "run", runs.folder / "undisturbed"
    two = ("trainer=ddp_cpu2", "trainer.precision=32-true", "data.num_workers=0")
    runs.complete(undisturbed, *two)
    process = runs.train(run, *two)
    until(lambda: records(run) > 3, process)
    process.send_signal(signal.SIGUSR1)
    ended = runs.finish(process)
    assert ended.code == 85 and "stopped by SIGUSR1 at" in ended.output
    runs.complete(run, *two)
    assert_same(run, undisturbed)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(each) for each in listed.split()]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
