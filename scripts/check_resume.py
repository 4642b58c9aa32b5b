"""SIGKILL a training run at random moments, resume it with the same command, and compare with an undisturbed run.

    python scripts/check_resume.py --kills 5 --workers 2 [Hydra overrides ...]

Exit code 1 unless the final weights, the averaged weights and the optimizers are equal bit for bit.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DEFAULTS = (
    "+experiment=vae_bezier",
    "data=shapes",
    "data.num_train=200",
    "data.num_tune=16",
    "data.num_test=16",
    "scale.batch_size=8",
    "scale.log_every=64",
    "scale.validate_every=256",
    "scale.samples_every=256",
    "scale.checkpoint_every=64",
    "scale.vae.encoder_widths=[8,8,8]",
    "scale.vae.decoder_widths=[8,8,8]",
    "scale.discriminator.width=8",
    "gan=patch",
    "evaluate.split=null",
)


def start(run: Path, overrides: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fluxflow_train", *overrides, f"run={run}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"training failed with {process.returncode}:\n{errors}")


def kill_at(run: Path, overrides: list[str], moment: float) -> bool:
    """SIGKILL the run `moment` seconds after this session's first record; False if it ended before."""
    metrics = run / "metrics.csv"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    process = start(run, overrides)
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
        time.sleep(0.005)
    deadline = time.monotonic() + moment
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return killed


def tensors(node: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its path."""
    if isinstance(node, torch.Tensor):
        return {prefix: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return {path: t for name, value in items for path, t in tensors(value, f"{prefix}/{name}").items()}


def differences(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit in the two runs."""
    found = []
    for left, right in (
        [load_file(run / "model.safetensors") for run in (a, b)],
        [tensors(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)) for run in (a, b)],
    ):
        found += [k for k in left.keys() | right.keys() if k not in left or k not in right]
        found += [k for k in left.keys() & right.keys() if not torch.equal(left[k], right[k])]
    for left, right in zip(*(records(run) for run in (a, b)), strict=False):
        found += [f"metrics.csv {k} at {left['images_seen']}" for k in left if left[k] != right[k]]
    if len(records(a)) != len(records(b)):
        found.append("metrics.csv has another number of rows")
    return sorted(found)


def records(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the clock."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "train/images_per_second"} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    overrides = [*DEFAULTS, f"budget.images={arguments.images}", f"data.num_workers={arguments.workers}"]
    overrides += arguments.overrides
    with tempfile.TemporaryDirectory() as folder:
        overrides.append(f"data.root={folder}/data")
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        finish(start(undisturbed, overrides))
        kills = 0
        for _ in range(arguments.kills):
            moment = moments.uniform(0, 1.5)
            if not kill_at(killed, overrides, moment):
                break
            kills += 1
            print(f"killed {moment:.2f} s after a record", flush=True)
        finish(start(killed, overrides))
        differing = differences(undisturbed, killed)
    print(f"{kills} kills, {arguments.workers} workers: {len(differing)} tensors differ")
    if differing or kills < arguments.kills:
        print("\n".join(differing[:20]) or "the run ended before the last kill: give more --images")
        sys.exit(1)


if __name__ == "__main__":
    main()
