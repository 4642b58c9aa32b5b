"""SIGKILL a training run at random moments, resume it with the same command, and compare with an undisturbed run.

    python scripts/kill_test.py --task vae --kills 20 --workers 2 [Hydra overrides ...]
    python scripts/kill_test.py --task flow --kills 20

The VAE trains against its discriminator; the flow on cached latents of a small VAE that is trained first. Every other
kill comes in the first 15 seconds of the command, imports included, the others within two seconds of a record, where
steps, checkpoints, pictures and validations are. Exit code 1 unless weights, averaged weights, optimizers, records and
health are equal bit for bit.
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

SHARED = (
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
    "evaluate.split=null",
)
TASKS = {
    "vae": ("+experiment=vae_bezier", "gan=patch"),
    "flow": (
        "+experiment=flow_bezier",
        "model/text=scratch",
        "scale.flow.width=32",
        "scale.flow.depth=2",
        "scale.flow.num_heads=2",
        "scale.flow.text_width=24",
        "callbacks.samples.num_prompts=2",
        "task.sampler.steps=2",
    ),
}


def start(run: Path, overrides: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fluxflow_train", *overrides, f"run={run}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"training failed with {process.returncode}:\n{errors}")


def kill(run: Path, overrides: list[str], seconds: float, after_a_record: bool) -> bool:
    """SIGKILL the run that long after it began, or after its first record of this session; False if it ended before."""
    metrics = run / "metrics.csv"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    process = start(run, overrides)
    # Opening the file again for the resumed run is a change, too: then the kill comes a little earlier.
    while after_a_record and process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
        time.sleep(0.005)
    deadline = time.monotonic() + seconds
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
    if (a / "health.json").read_bytes() != (b / "health.json").read_bytes():
        found.append("health.json")
    return sorted(found)


def records(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the clock."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "train/images_per_second"} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="vae")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    overrides = [*SHARED, f"budget.images={arguments.images}", f"data.num_workers={arguments.workers}"]
    overrides += arguments.overrides
    with tempfile.TemporaryDirectory() as folder:
        overrides.append(f"data.root={folder}/data")
        if arguments.task == "flow":
            finish(start(Path(folder, "vae"), ["+experiment=vae_bezier", *SHARED, *overrides[-1:], "budget.images=64"]))
            overrides.append(f"vae={folder}/vae")
        overrides = [*TASKS[arguments.task], *overrides]
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        began = time.monotonic()
        finish(start(undisturbed, overrides))
        whole = time.monotonic() - began
        kills = 0
        for number in range(arguments.kills):
            after_a_record = number % 2 == 1
            seconds = moments.uniform(0, 2 if after_a_record else min(whole / 2, 15))
            if not kill(killed, overrides, seconds, after_a_record):
                break
            kills += 1
            print(f"killed {seconds:.2f} s after {'a record' if after_a_record else 'it began'}", flush=True)
        finish(start(killed, overrides))
        differing = differences(undisturbed, killed)
    print(f"{arguments.task}: {kills} kills, {arguments.workers} workers: {len(differing)} differences")
    if differing or kills < arguments.kills:
        print("\n".join(differing[:20]) or "the run ended before the last kill: give more --images")
        sys.exit(1)


if __name__ == "__main__":
    main()
