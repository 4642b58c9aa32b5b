"""A program that trains the same runs on 1, 2 and 4 ranks: `python ranks.py FOLDER`, with FOLDER/cases.json.

The ranks part by fork after the imports, to save those; each world meets through torchrun's variables. The first rank
writes what it saw of each run: every record in full precision, and the reduced gradients of the first step.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fluxflow_train import ranks
from fluxflow_train.cli import config_folder
from fluxflow_train.composing import bind_vae, plain
from fluxflow_train.run import fit, quieten
from fluxflow_train.run_directory import RunDirectory
from fluxflow_train.tasks.budget import BudgetTask
from fluxflow_train.tasks.guard import Guard
from fluxflow_train.tasks.vae import VAETask


def configuration(run: Path, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [*overrides, f"run={run}", "run_id=test"])
    if "vae" in cfg:
        bind_vae(cfg)
    return plain(cfg)


def observe(seen: dict[str, Any]) -> None:
    """Look on: gradients as the first updates get them, before they are clipped; charged channels; every record."""
    step, record, whole_batch = Guard.step, BudgetTask.record, VAETask.whole_batch

    def observed_step(self: Guard, net: Any, optimizer: Any, clip_norm: float) -> Any:
        if len(seen["gradients"]) < seen["nets"]:
            seen["gradients"].append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        return step(self, net, optimizer, clip_norm)

    def observed_record(self: BudgetTask, values: dict[str, float]) -> None:
        seen["records"].append((self.images_seen, dict(values)))
        record(self, values)

    def observed_whole_batch(self: VAETask, parts: Any) -> Any:
        whole = whole_batch(self, parts)
        seen["charged"].append(whole.charged.tolist())
        return whole

    VAETask.whole_batch = observed_whole_batch  # type: ignore[method-assign]
    Guard.step, BudgetTask.record = observed_step, observed_record  # type: ignore[method-assign]


def run_rank(folder: Path, rank: int, world: int, port: int, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    quieten()
    places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    seen: dict[str, Any] = {}
    observe(seen)
    with ranks.process_group(ranks.backend()) as here:
        for name, case in cases.items():
            if world not in case["worlds"]:
                continue
            seen |= {"gradients": [], "records": [], "charged": [], "nets": case["nets"]}
            run = folder / f"{name}-{world}"
            config = configuration(run, case["overrides"])
            here.first(lambda run=run: run.mkdir())
            task, _, _ = fit(RunDirectory(run), config, here)
            seen["weights"] = {name: p.detach() for name, p in task.named_parameters()}
            if here.is_first:
                torch.save(seen, folder / f"{name}-{world}.pt")


def main(folder: Path) -> int:
    """0 where every rank ended well; where one does not, the others are stopped."""
    content = json.loads((folder / "cases.json").read_text())
    forked = multiprocessing.get_context("fork")
    for world, port in content["ports"].items():
        started = [
            forked.Process(target=run_rank, args=(folder, rank, int(world), port, content["cases"]))
            for rank in range(int(world))
        ]
        for process in started:
            process.start()
        while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
            time.sleep(0.05)
        for process in started:
            process.kill()
            process.join()
        if any(process.exitcode for process in started):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
