"""The run directory: made once, resumed by naming it again. Its layout is a contract with people and other commands."""

import errno
import fcntl
import os
import pickle
import secrets
import shlex
import socket
import warnings
import zipfile
import zlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fluxflow_train.callbacks.checkpoint import BEST, LAST, PREVIOUS
from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically

# What may differ between the run that began and the one that resumes: where and how, never what.
READING = ("num_workers", "root", "cache_bytes", "source.root", "module.num_workers")
READING += ("module.cache_dir", "module.cache_bytes", "module.source.root")
FREE = (
    "run",
    "run_id",
    "trainer",
    "logger",
    "callbacks",
    "evaluate",
    "budget.hours",
    *(f"data.{key}" for key in READING),
)
FREE += ("latents_device", "task.latents.device", "task.latents.root", "latents.device", "latents.root")
FREE += ("task.num_micro_batches",)  # rounds sums in another order, no more
FREE += ("vae", "task.vae")  # a VAE may move; that its weights stay the same is checked
HERE = "<run>"  # stands for the run directory while the configuration is resolved
LOCK = ".lock"
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, zlib.error)  # what zipfile makes of damage


class RunDirectory:
    """Paths of a run, its configuration and its newest valid checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: Any = None

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def exists(self) -> bool:
        return self.config_path.is_file()

    def config(self) -> DictConfig:
        """The configuration that the run began with; its paths point into this folder, wherever it was moved.

        Raises:
            UserError: this is no run directory.
        """
        if not self.exists():
            raise UserError(
                f"{self.path} is no run directory (no config.yaml in it): give the folder that training made"
            )
        config = OmegaConf.load(self.config_path)
        assert isinstance(config, DictConfig)
        config.run = str(self.path)
        return config

    def lock(self) -> None:
        """Keep other jobs out for as long as this process lives.

        Raises:
            UserError: another job is training here.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / LOCK).open("a+")
        try:
            # A lock of the process, not of the open file: workers that outlive it for a moment don't hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warnings.warn(f"{self.path} knows no locks ({error}): start no second job on it", stacklevel=2)
                return
            file.seek(0)
            raise UserError(
                f"{self.path} is being trained by {file.read().strip() or 'another job'}: wait for it, or stop it"
            ) from error
        file.truncate(0)
        job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
        file.flush()
        self._lock = file

    def create(self, config: DictConfig, overrides: list[str]) -> None:
        self.lock()
        if self.exists():
            raise UserError(f"another job has just begun a run in {self.path}: run the same command again to go on")
        write_atomically(self.path / "overrides.txt", "".join(f"{o}\n" for o in overrides).encode())
        movable = config.copy()
        movable.run = HERE
        content = (
            OmegaConf.to_yaml(movable, resolve=True).replace(f"run: {HERE}\n", "run: null\n").replace(HERE, "${run}")
        )
        write_atomically(self.config_path, content.encode())

    def command(self) -> str:
        """The command that began the run, as one would type it; the folder left to choose."""
        overrides = (self.path / "overrides.txt").read_text().splitlines()
        return shlex.join(["python", "-m", "fluxflow_train", *(o for o in overrides if not o.startswith("run="))])

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; None before the first.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        folder = self.path / "checkpoints"
        present = [path for path in (folder / LAST, folder / PREVIOUS, folder / BEST) if path.exists()]
        for path in present:
            damage = damaged(path)
            if not damage:
                return path
            warnings.warn(f"{path} is damaged ({damage}): using the one before it", stacklevel=2)
        if present:
            raise UserError(
                f"no checkpoint in {folder} can be read: put a good copy there, or remove the folder to start again"
            )
        return None


def damaged(path: Path) -> str:
    """What is wrong with a file that torch.save wrote; "" where nothing is.

    torch.load notices a file that was cut short, but lets a flipped bit of a weight pass, unlike the checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad}"
        torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def new_run_id() -> str:
    """SLURM's job id, which a requeue keeps; else the time, and a few letters against two runs in one second."""
    job = os.environ.get("SLURM_JOB_ID")
    return job or f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def refuse_differences(ours: DictConfig, saved: DictConfig, path: Path) -> None:
    """Raises UserError, naming the first keys, where the command asks for another run than the one in `path`."""
    new, old = flat(OmegaConf.to_container(ours, resolve=True)), flat(OmegaConf.to_container(saved, resolve=True))
    differing = [
        f"{key}={new.get(key)} (the run has {old.get(key)})"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and not is_free(key)
    ]
    roots = [d for d in differing if not d.startswith("data.module.")] or differing
    if roots:
        raise UserError(
            f"{path} holds another run: {'; '.join(roots[:3])}{' ...' if len(roots) > 3 else ''}: "
            "leave those overrides out to resume it, or name another run=DIR"
        )


def resumed_config(ours: DictConfig, saved: DictConfig, overrides: list[str]) -> DictConfig:
    """The saved configuration with those overrides of this session that a resumed run may take.

    Raises:
        UserError: an override would make it another run.
    """
    config = saved.copy()
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        if not is_free(key) and OmegaConf.select(ours, key) != OmegaConf.select(saved, key):
            raise UserError(
                f"{key} can't change in a run that has begun: leave it out to resume, or begin another run "
                f"(+experiment=... run=ANOTHER); free are {', '.join(FREE[2:6])} and data.num_workers"
            )
        if is_free(key) and key not in ("run", "run_id"):
            OmegaConf.update(config, key, OmegaConf.select(ours, key))
    config.trainer.precision = saved.trainer.precision
    return config


def is_free(key: str) -> bool:
    if key == "trainer.precision":  # another precision computes other numbers
        return False
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    if not isinstance(node, dict):
        return {prefix: node}
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        leaves |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves
