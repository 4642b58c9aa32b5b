"""What a person types, and the one line that answers what is wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
TYPOS = [
    (["+experiment=vae_bezir"], "vae_bezier"),
    (["+experiment=vae_bezier", "activation=rellu"], "activation=relu"),
    (["+experiment=vae_bezier", "task.kl_wieght=1"], "task.kl_weight"),
    (["+experiment=vae_bezier", "sede=1"], "seed"),
    (["+experiment=vae_bezier", "data.num_wrokers=1"], "data.num_workers"),
    (["experiment=vae_bezier"], "+experiment"),
    (["+experiment=vae_bezier", "data=shards", "data.train=a-{0..9}.tar"], "Quote"),
]


def run(*arguments: str, module: str = "fluxflow_train", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(("arguments", "remedy"), TYPOS)
def test_misspelt_option_is_answered_in_one_line(arguments: list[str], remedy: str, tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert remedy in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["+experiment=vae_relu", "--cfg", "job"], ["sede=1"]])
def test_quick_answers_need_no_torch(arguments: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    runpy.run_module('fluxflow_train', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["fluxflow_train.evaluate", "fluxflow_train.prepare", "fluxflow_train.report"])
def test_every_command_has_help(module: str) -> None:
    result = run("--help", module=module)
    assert result.returncode == 0
    assert "Override anything" in result.stdout


def test_nothing_chosen_is_answered(command: Command) -> None:
    code, output = command("fluxflow_train")
    assert code == 1
    assert "+experiment=vae_bezier" in output


def test_missing_shard_is_named(tmp_path: Path, command: Command) -> None:
    overrides = ["+experiment=vae_bezier", "data=shards", "data.train='no-{00..01}.tar'", "data.val=no.tar"]
    code, output = command("fluxflow_train", *overrides, f"run={tmp_path / 'run'}")
    assert code == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert "no-00.tar" in output


def test_evaluating_no_run_is_answered(tmp_path: Path, command: Command) -> None:
    code, output = command("fluxflow_train.evaluate", f"run={tmp_path}")
    assert code == 1
    assert "no run directory" in output


def test_impossible_model_is_answered_with_its_own_words(tmp_path: Path, command: Command) -> None:
    code, output = command("fluxflow_train", "+experiment=vae_bezier", "heads=curly", f"run={tmp_path / 'run'}")
    assert code == 1
    assert 'heads must be "bezier" or "plain", got "curly"' in output


def test_prepare_writes_the_shards(tmp_path: Path, command: Command) -> None:
    few = ["data=shapes", "data.num_train=20", "data.num_tune=4", "data.num_test=4", "scale.resolution=32"]
    code, output = command("fluxflow_train.prepare", *few, f"data.root={tmp_path}")
    assert code == 0
    assert "train: 20 images" in output
    assert list(tmp_path.rglob("*.tar"))
