"""Images per second of two processes that train one run, beside two processes that know nothing of each other.

    python scripts/bench_ddp.py [--rounds 3] [--json FILE] [Hydra overrides ...]

Every process has one thread and a batch of four; so the work is the same and what is missing to the sum of the two is
the price of being one run. The strategies take turns: a DDP for each net (the default), and one DDP around the
LightningModule that looks for unused parameters. VAE with its discriminator from the start, tiny scale.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

BATCH = 4  # images of a process in a step
WARM_UP = 3  # records that aren't counted
RUN = (
    "+experiment=vae_bezier",
    "gan=patch",
    "task.adversary.disc_start=0",
    "task.adversary.gan_start=0",
    "data=shapes",
    "data.num_train=2000",
    "data.num_tune=16",
    "data.num_test=16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "scale.validate_every=1000000",
    "scale.samples_every=1000000",
    "scale.checkpoint_every=1000000",
    "evaluate.split=null",
)
WHOLE = (
    "trainer.strategy._target_=lightning.pytorch.strategies.DDPStrategy",
    "+trainer.strategy.find_unused_parameters=true",
)


def start(run: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fluxflow_train", *RUN, *overrides, f"run={run}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def speed(run: Path, process: subprocess.Popen) -> float:
    """Images per second: the median over the records of a finished run."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    with (run / "metrics.csv").open() as file:
        speeds = [float(row["train/images_per_second"]) for row in csv.DictReader(file) if row["train/loss"]]
    return median(speeds[WARM_UP:])


def contenders(folder: Path, steps: int, overrides: list[str]) -> dict[str, float]:
    """One round of each, images per second."""

    def batch(processes: int) -> list[str]:
        size = BATCH * processes
        return [f"scale.batch_size={size}", f"budget.images={size * steps}", f"scale.log_every={size * 10}", *overrides]

    single = start(folder / "single", *batch(1))
    speeds = {"one process": speed(folder / "single", single)}
    pair = [(folder / name, start(folder / name, *batch(1))) for name in ("left", "right")]
    speeds["two independent processes"] = sum(speed(run, process) for run, process in pair)
    for name, strategy in (("DDP for each net", ()), ("one DDP, find_unused_parameters", WHOLE)):
        run = folder / name.split()[0]
        speeds[name] = speed(run, start(run, *batch(2), "trainer=ddp_cpu2", *strategy))
    return speeds


def measure(rounds: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """Medians over `rounds`, images per second by contender."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            data = f"data.root={Path(folder).parent / 'fluxflow-bench'}"
            found.append(contenders(Path(folder), steps, [data, *overrides]))
        print({name: round(value, 1) for name, value in found[-1].items()}, flush=True)
    return {name: median(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    arguments = parser.parse_args()
    medians = measure(arguments.rounds, arguments.steps, arguments.overrides)
    independent = medians["two independent processes"]
    for name, value in medians.items():
        print(f"{name:36} {value:7.1f} images/s  {value / independent:.2f} of two independent processes")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
