"""Small runs that can be hurt, and the table of what became of them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

PATIENCE = 120  # seconds, after which a command counts as hung
OPTIONS = (
    "+experiment=vae_bezier",
    "gan=patch",
    "data.num_workers=2",
    "budget.images=960",
    "scale.batch_size=8",
    "scale.log_every=32",
    "scale.validate_every=320",
    "scale.samples_every=320",
    "scale.checkpoint_every=96",
    "evaluate.split=null",
)


class Ended(NamedTuple):
    code: int
    output: str


class Runs(NamedTuple):
    """Commands as a person starts them, each in a process group of its own."""

    options: tuple[str, ...]
    folder: Path
    command: Callable[..., Any]

    def start(self, module: str, *arguments: str) -> subprocess.Popen:
        log = (self.folder / "output.txt").open("a")
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def train(self, run: Path, *more: str) -> subprocess.Popen:
        return self.start("fluxflow_train", *self.options, *more, f"run={run}")

    def finish(self, process: subprocess.Popen) -> Ended:
        """Wait for it. Fails where it hangs; nothing of its group is left behind."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hung for {PATIENCE} s:\n{self.output()}")
        finally:
            end(process)
        return Ended(code, self.output())

    def output(self) -> str:
        log = self.folder / "output.txt"
        return log.read_text() if log.exists() else ""

    def complete(self, run: Path, *more: str) -> str:
        """Train to the end; what was written to the terminal, by this and by what came before."""
        if any(option.startswith("trainer=") for option in more):
            ended = self.finish(self.train(run, *more))
            assert ended.code == 0, ended.output
            return ended.output
        done = self.command("fluxflow_train", *self.options, *more, f"run={run}")  # in this process: no imports
        assert done.code == 0, done.output
        return self.output() + done.output


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for something to happen while a process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "it ended before anything could happen to it"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def records(run: Path) -> int:
    return len((run / "metrics.csv").read_text().splitlines()) if (run / "metrics.csv").exists() else 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(run: Path, reference: Path) -> None:
    """Nothing was lost: the weights are those of the run that nothing happened to, bit for bit."""
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture(scope="session")
def options(small: tuple[str, ...], data_root: Path) -> tuple[str, ...]:
    return (*small, *OPTIONS, f"data.root={data_root}")


@pytest.fixture
def runs(options: tuple[str, ...], tmp_path: Path, command: Callable[..., Any]) -> Runs:
    return Runs(options, tmp_path, command)


@pytest.fixture(scope="session")
def reference(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., int]) -> Path:
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert launch("fluxflow_train", *options, f"run={run}") == 0
    return run


@pytest.fixture(scope="session")
def halfway(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., int]) -> Path:
    """The same, killed in the middle, with two checkpoints."""
    folder = tmp_path_factory.mktemp("halfway")
    run = folder / "run"
    process = Runs(options, folder, launch).train(run)
    until(lambda: (run / "checkpoints" / "previous.ckpt").exists() and records(run) > 12, process)
    end(process)
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MB; tests make it smaller, or read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was done to a run, and what became of it."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and "tests/faults/" in report.nodeid
    ]
    if not reports:
        return
    terminalreporter.section("faults")
    for report in sorted(reports, key=lambda report: report.nodeid):
        name = report.nodeid.partition("::test_")[2].replace("_", " ")
        outcome = "nothing lost" if report.passed else "LOST OR HUNG"
        terminalreporter.write_line(f"{name:64} {outcome}  {report.duration:5.1f} s")
    failed = sum(report.failed for report in reports)
    terminalreporter.write_line(f"{len(reports)} faults, {failed} lost or hung")
