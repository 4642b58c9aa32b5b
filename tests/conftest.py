"""Fixtures compose the real configuration, made small."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fluxflow_train.cli import config_folder

SMALL = (
    "data=shapes",
    "data.num_train=48",
    "data.num_tune=12",
    "data.num_test=12",
    "scale.resolution=32",
    "scale.batch_size=4",
    "scale.log_every=8",
    "scale.validate_every=16",
    "scale.samples_every=16",
    "scale.checkpoint_every=8",
    "scale.vae.encoder_widths=[8,8,8]",
    "scale.vae.decoder_widths=[8,8,8]",
    "scale.vae.context_width=16",
    "scale.discriminator.width=8",
    "trainer=cpu",
    "trainer.precision=32-true",
    "budget.images=32",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides that make a run of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards are written once for the session."""
    return tmp_path_factory.mktemp("data")


class Command(NamedTuple):
    """What a command left: its exit code and what it wrote to the terminal."""

    code: int
    output: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Command]:
    """`command("fluxflow_train", "run=DIR", ...)` as typed behind `python -m`, in this process to save the imports."""

    def run(module: str, *arguments: str) -> Command:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", [module, *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        name = f"{module}.__main__" if module == "fluxflow_train" else module
        try:
            importlib.import_module(name).main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Command(code, captured.out + captured.err)

    return run


@pytest.fixture
def config(data_root: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """`config("+experiment=vae_bezier", ...)`: the training configuration, small, in `tmp_path`."""

    def build(*overrides: str, small: bool = True) -> DictConfig:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose(
                "train",
                [*(SMALL if small else ()), f"data.root={data_root}", f"run={tmp_path / 'run'}", *overrides],
                return_hydra_config=False,
            )

    return build
