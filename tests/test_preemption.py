"""Signals leave a note; what that means for each command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxflow_train.run_directory import RunDirectory, damaged

SNIPPET = "import os, signal, sys; from fluxflow_train import preemption; preemption.listen(); "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SNIPPET + code], capture_output=True, text=True, timeout=60)


def test_listening_needs_no_heavy_import() -> None:
    done = run("print([name for name in ('torch', 'lightning', 'hydra', 'numpy') if name in sys.modules])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_only_leaves_a_note(name: str) -> None:
    done = run(f"os.kill(os.getpid(), signal.{name}); print(preemption.noted()); preemption.check()")
    assert done.stdout.strip() == name
    assert f"Stopped: stopped by {name}" in done.stderr


def test_the_first_of_several_is_the_one_that_is_named() -> None:
    done = run("[os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGTERM)]; print(preemption.noted())")
    assert done.stdout.strip() == "SIGUSR1"


def test_second_interrupt_is_not_put_off() -> None:
    done = run("os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)")
    assert "KeyboardInterrupt" in done.stderr


def test_preparing_ends_with_85(tmp_path: Path) -> None:
    options = ["data=shapes", "data.num_train=20000", "data.num_tune=8", "data.num_test=8", f"data.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxflow_train.prepare", *options], stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".shapes-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85, errors
    assert errors.splitlines()[-1] == "stopped by SIGTERM: the same command goes on from here"
    assert not list(tmp_path.glob(".shapes-*"))


def test_lock_keeps_another_process_out_and_goes_with_its_own(tmp_path: Path) -> None:
    code = "from pathlib import Path; from fluxflow_train.run_directory import RunDirectory; "
    code += f"RunDirectory(Path({str(tmp_path)!r})).lock()"
    directory = RunDirectory(tmp_path)
    directory.lock()
    directory.lock()  # again, by the same
    done = run(code)
    assert f"is being trained by process {os.getpid()} on" in done.stderr
    directory._lock.close()
    assert run(code).returncode == 0


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    """torch.load lets most of them pass."""
    import random

    import torch

    path = tmp_path / "last.ckpt"
    state = {f"weight{i}": torch.randn(100) for i in range(5)}
    torch.save(state, path)
    assert damaged(path) == ""
    whole = path.read_bytes()
    draws = random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(data)
        if not damaged(path):  # then it was in the padding: what is loaded is the same
            loaded = torch.load(path, weights_only=True)
            assert all(torch.equal(loaded[name], state[name]) for name in state)
