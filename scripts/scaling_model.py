"""A model on paper: how well training would scale from 1 to 1,024 GPUs, from what one process here shows of a step.

    python scripts/scaling_model.py [--measured FILE] [--json FILE] [Hydra overrides ...]

Measured here, in one process: when in its backward each parameter's gradient is ready, hence when each of DDP's buckets
can begin to travel; the share of a step that each net's backward takes; the bytes. Assumed, and printed: what a GPU
computes in a second, and the bandwidth and latency of the network. From these a step of N GPUs is laid out: a ring
all-reduce moves 2 (N - 1) / N of the bytes of a bucket over the slowest link, messages pass 2 log2 N times, buckets
follow one another, and what has not arrived when its backward ends is waited for. (Source of the ring's cost: Patarasuk
& Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".) Stragglers, data loading and
validation are not in it.

`--measured` takes the file of `bench_ddp.py --json` and prints what one and two processes really did beside the model.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fluxflow_train.cli import config_folder
from fluxflow_train.composing import plain

BUCKET_BYTES = 25 * 2**20  # DDP's default; its first bucket holds 1 MiB
FIRST_BUCKET_BYTES = 2**20
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE = 8


class Network(NamedTuple):
    """Bytes per second in one direction, of a GPU inside a node and of a whole node; seconds for a message."""

    name: str
    inside: float
    between: float
    latency: float


NETWORKS = (
    Network("NVLink 300 GB/s, InfiniBand 8 x 400 Gbit/s a node", 300e9, 400e9, 10e-6),
    Network("NVLink 300 GB/s, Ethernet 100 Gbit/s a node", 300e9, 12.5e9, 30e-6),
    Network("PCIe 20 GB/s, Ethernet 25 Gbit/s a node", 20e9, 3.1e9, 50e-6),
)


class Bucket(NamedTuple):
    ready: float  # as a fraction of its net's backward
    size: int  # bytes


class Backward(NamedTuple):
    """One net's backward: its share of the step's time, and its buckets in the order in which they are ready."""

    share: float
    buckets: list[Bucket]


class Step(NamedTuple):
    flops: float
    seconds: float
    backwards: list[Backward]

    @property
    def size(self) -> int:
        return sum(bucket.size for backward in self.backwards for bucket in backward.buckets)


# ---- what one process shows ----


def watched(net: nn.Module, backward: Any) -> tuple[float, list[tuple[float, int]]]:
    """Seconds of `backward`, and when the gradient of each parameter was there, with its bytes."""
    ready: list[tuple[float, int]] = []
    began = time.perf_counter()

    def note(parameter: Tensor) -> None:
        ready.append((time.perf_counter() - began, parameter.numel() * 4))

    handles = [p.register_post_accumulate_grad_hook(note) for p in net.parameters() if p.requires_grad]
    began = time.perf_counter()
    backward()
    seconds = time.perf_counter() - began
    for handle in handles:
        handle.remove()
    return seconds, ready


def bucketed(ready: list[tuple[float, int]], seconds: float) -> list[Bucket]:
    """DDP's buckets: filled in the order of readiness, each ready with its last gradient."""
    buckets, size, limit = [], 0, FIRST_BUCKET_BYTES
    for moment, num_bytes in ready:
        size += num_bytes
        if size >= limit:
            buckets.append(Bucket(moment / seconds, size))
            size, limit = 0, BUCKET_BYTES
    return [*buckets, Bucket(1.0, size)] if size else buckets


def one_step(overrides: list[str], batch: int, rounds: int = 3) -> Step:
    """A VAE's step with its discriminator, forward and backward, on random images."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["+experiment=vae_bezier", "gan=patch", "run=unused", "run_id=unused", *overrides])
    config = plain(cfg)
    task = instantiate(config.task)
    size = config.scale.resolution
    x = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last) * 2 - 1
    eps = torch.randn(batch, *task.vae.latent_shape(size, size))

    def passes() -> Iterator[tuple[float, list[tuple[float, int]]]]:
        out = task.vae(x, eps)
        loss = (out.x_hat - x).square().mean() + out.mu.square().mean() + out.logvar.mean()
        yield watched(task.vae, loss.backward)
        logits = task.discriminator(x), task.discriminator(out.x_hat.detach())
        yield watched(task.discriminator, (logits[0] - logits[1]).square().mean().backward)

    with FlopCounterMode(display=False) as counter:
        list(passes())
    found = []
    for _ in range(rounds):
        task.zero_grad()
        began = time.perf_counter()
        backwards = list(passes())
        found.append((time.perf_counter() - began, backwards))
    seconds, backwards = sorted(found, key=lambda each: each[0])[rounds // 2]
    shares = [Backward(spent / seconds, bucketed(ready, spent)) for spent, ready in backwards]
    return Step(float(counter.get_total_flops()), median(each[0] for each in found), shares)


# ---- the model ----


def reduce_seconds(size: int, gpus: int, network: Network) -> float:
    """A ring over all GPUs, as slow as its slowest link."""
    bandwidth = network.inside if gpus <= GPUS_PER_NODE else min(network.inside, network.between)
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.log2(gpus) * network.latency


def efficiency(step: Step, compute: float, gpus: int, network: Network) -> float:
    """Seconds of computing over seconds of a step on `gpus`."""
    waited = 0.0
    for backward in step.backwards:
        length = backward.share * compute
        free = 0.0  # when the network is, counted from the beginning of this backward
        for bucket in backward.buckets:
            free = max(free, bucket.ready * length) + reduce_seconds(bucket.size, gpus, network)
        waited += max(0.0, free - length)
    return compute / (compute + waited)


def table(step: Step, compute: float) -> Table:
    shown = Table(title="Predicted efficiency: A MODEL ON PAPER, not a measurement", title_justify="left")
    shown.add_column("GPUs", justify="right")
    for network in NETWORKS:
        shown.add_column(network.name, justify="right")
    for gpus in GPUS:
        shown.add_row(f"{gpus:,}", *(f"{efficiency(step, compute, gpus, network):.1%}" for network in NETWORKS))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images of a GPU in a step")
    parser.add_argument("--tflops", type=float, default=150.0, help="that a GPU sustains in bf16")
    parser.add_argument("--measured", type=Path, help="what bench_ddp.py --json wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as scale=small")
    arguments = parser.parse_args()
    step = one_step(arguments.overrides or ["scale=small"], arguments.batch)
    compute = step.flops / (arguments.tflops * 1e12)
    console = Console(width=160)
    console.print(
        f"measured here: {step.flops / 1e9:,.1f} GFLOP and {step.seconds:.2f} s for a step of {arguments.batch} images "
        f"in one process, {step.size / 2**20:,.1f} MiB of fp32 gradients in "
        f"{sum(len(each.buckets) for each in step.backwards)} buckets; backward is "
        f"{sum(each.share for each in step.backwards):.0%} of the step",
        f"assumed: {arguments.tflops:g} TFLOP/s a GPU, so {1000 * compute:.2f} ms a step; fp32 gradients; "
        f"{GPUS_PER_NODE} GPUs a node",
        table(step, compute),
        sep="\n",
    )
    if arguments.measured:
        measured = json.loads(arguments.measured.read_text())
        ratio = measured["DDP for each net"] / measured["two independent processes"]
        console.print(
            f"measured on this machine (CPU, gloo, tiny scale): 1 process {measured['one process']:.1f} images/s, 2 "
            f"processes {measured['DDP for each net']:.1f}, which is {ratio:.2f} of two independent ones"
        )
    if arguments.json:
        predicted = {
            network.name: {gpus: efficiency(step, compute, gpus, network) for gpus in GPUS} for network in NETWORKS
        }
        content = {"measured": step._asdict() | {"size": step.size}, "compute": compute, "predicted": predicted}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
