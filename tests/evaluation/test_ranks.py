"""1, 2 and 4 ranks: who takes what, and one report whatever their number.

Run as a program, this file is four ranks: `python test_ranks.py FOLDER`. They part after the imports, to save those.
"""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxflow_train.data.sources.shapes import Shapes
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.place import Options
from fluxflow_train.evaluation.protocol import parse
from fluxflow_train.evaluation.run import evaluate_run
from fluxflow_train.metrics.extractor import state_sha256
from fluxflow_train.metrics.module_extractor import ModuleExtractor
from fluxflow_train.ranks import Ranks, meeting_point, placed, process_group

WORLDS = (1, 2, 4)
COUNTS = (48, 47, 3)  # of 48 images: shares that are even, that are not, and a rank without any


def test_a_lone_process_is_alone() -> None:
    assert placed({}) == Ranks(0, 1, 0)
    assert placed({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == Ranks(0, 1, 0)  # the job's, not this process's
    with process_group() as ranks:
        assert ranks.first(lambda: {"a": [1]}) == {"a": [1]} and not torch.distributed.is_initialized()


def test_torchrun_and_srun_say_which_rank() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"}
    assert placed(torchrun) == Ranks(3, 8, 1, 2) and placed(torchrun).machines == 4
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_NODES": "2"}
    assert placed(srun) == Ranks(5, 6, 2, 3)
    with pytest.raises(UserError, match="5 tasks on 2 nodes"):
        placed({**srun, "SLURM_STEP_NUM_TASKS": "5"})


def test_steps_of_a_job_meet_in_places_of_their_own() -> None:
    step = {"SLURM_STEP_NODELIST": "gpu[007-011]", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    host, port = meeting_point(step)
    assert host == "gpu007" and 15_000 <= port < 30_000
    assert meeting_point({**step, "SLURM_STEP_ID": "3"}) != (host, port)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("world", WORLDS)
def test_shares_are_disjoint_and_whole(count: int, world: int) -> None:
    shares = [Ranks(rank, world, 0).share(range(count)) for rank in range(world)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- several processes ----


def join(folder: Path, rank: int, world: int, name: str) -> None:
    """Let `process_group` find the others, as torchrun would: a store of one world's own on a free port."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = (folder / f"port-{name}").read_text()


def evaluate(folder: Path, world: int, count: int) -> dict[str, Any]:
    """The report on the first `count` images, of a copy of the run that each world has for itself."""
    given = json.loads((folder / "given.json").read_text())
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    words = {key: given["extractor"][key] for key in ("name", "side", "resizer", "mean", "std")}
    report, _ = evaluate_run(
        folder / f"run-{world}",
        parse(json.dumps(given), "test"),
        Options(device="cpu", num_images=count),
        own=Shapes(str(folder), 32, 48, 12, 12, 0.5, 0),
        built=ModuleExtractor(module, **words, weights_sha256=state_sha256({})),
        root=folder / f"root-{world}",
        provenance={"command": "evaluate", "resolution": 32},
    )
    return report


def failure(folder: Path) -> str:
    """What each rank makes of an error on the first."""

    def refuse() -> None:
        raise UserError("wrong weights")

    with process_group() as ranks:
        try:
            ranks.first(refuse)
        except UserError as error:
            return str(error)
        except SystemExit as stop:
            return f"exit {stop.code}"
    return "nothing"


def run_rank(folder: Path, rank: int) -> None:
    for world in WORLDS:
        if rank >= world:
            continue
        for count in COUNTS:
            join(folder, rank, world, f"{world}-{count}")
            report = evaluate(folder, world, count)
            (folder / f"report-{world}-{count}-{rank}.json").write_text(json.dumps(report))
    join(folder, rank, 4, "failure")
    (folder / f"failure-{rank}.txt").write_text(failure(folder))


def run_ranks(folder: Path) -> int:
    """0 where every rank ended well; where one does not, the others are stopped."""
    forked = multiprocessing.get_context("fork")
    started = [forked.Process(target=run_rank, args=(folder, rank)) for rank in range(max(WORLDS))]
    for process in started:
        process.start()
    while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
        time.sleep(0.05)
    for process in started:
        process.kill()
    return max(abs(process.exitcode or 0) for process in started)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vae_run: Path, protocol_content: dict[str, Any]) -> Path:
    """What four processes left, in worlds of 1, 2 and 4 of them."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "given.json").write_text(json.dumps(protocol_content))
    names = [*(f"{world}-{count}" for world in WORLDS for count in COUNTS), "failure"]
    for name, port in zip(names, free_ports(len(names)), strict=True):
        (folder / f"port-{name}").write_text(str(port))
    for world in WORLDS:
        shutil.copytree(vae_run, folder / f"run-{world}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, __file__, str(folder)], env=environment, timeout=100).returncode == 0
    return folder


def read(folder: Path, world: int, count: int, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"report-{world}-{count}-{rank}.json").read_text())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world", WORLDS)
def test_one_report_on_any_number_of_ranks(
    folder: Path, world: int, count: int, numbers: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    alone = read(folder, 1, count, 0)
    reports = [read(folder, world, count, rank) for rank in range(world)]
    assert all(report == reports[0] for report in reports)
    assert reports[0]["environment"]["world_size"] == world
    assert reports[0]["samples"]["synced"] == reports[0]["samples"]["expected"] == count
    ours, theirs = numbers(reports[0]), numbers(alone)
    values = zip(ours.pop("results")[0], theirs.pop("results")[0], strict=True)
    for one, other in values:
        assert one["name"] == other["name"]
        assert one["raw"] == pytest.approx(other["raw"], rel=1e-9, abs=1e-9)
        assert (one["interval"] or []) == pytest.approx(other["interval"] or [], rel=1e-9, abs=1e-9)
    assert ours["samples"] == theirs["samples"] and ours["reference"] == theirs["reference"]


def test_an_error_is_said_once(folder: Path) -> None:
    said = [(folder / f"failure-{rank}.txt").read_text() for rank in range(4)]
    assert said == ["wrong weights", "exit 1", "exit 1", "exit 1"]


if __name__ == "__main__":
    sys.exit(run_ranks(Path(sys.argv[1])))
