"""The fused Bezier activation beside the one of `fluxflow` 0.8.1 and beside a copy of the bytes it must move.

Forward + backward of (4, 640, 64, 64) -> (4, 128, 64, 64), t = tanh, p = SiLU, interleaved as FluxFlow 0.8 has it.

    python scripts/bench_bezier.py [--rounds 15] [--peer-python PYTHON] [--json FILE]

`copy_ratio`: our time in float32 over that of copying the bytes that forward and backward can't avoid to move: the
input read twice, its gradient written, output written, output gradient read; half of them are the copy's reads.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from alternation import Worker, alternate, machine, serve

SHAPE, CHANNELS = (4, 640, 64, 64), 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORKERS = ("ours", "peer", "copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with fluxflow 0.8.1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("WHO", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(work_of(*options.worker))
        return
    print(machine({"torch": torch.__version__, "fluxflow": "0.8.1"}))
    print(f"{'':6}{'ours ms':>10}{'peer ms':>10}{'copy ms':>10}{'peer/ours':>11}{'ours/copy':>11}")
    result = {}
    for dtype in DTYPES:
        workers = {
            who: Worker(
                options.peer_python if who == "peer" else sys.executable, Path(__file__), "--worker", who, dtype
            )
            for who in WORKERS
        }
        taken = {name: m.median for name, m in alternate(workers, options.rounds, warmup=3).items()}
        for worker in workers.values():
            worker.__exit__(None, None, None)
        speedup, copies = taken["peer"] / taken["ours"], taken["ours"] / taken["copy"]
        print(f"{dtype:6}" + "".join(f"{1e3 * taken[w]:10.1f}" for w in WORKERS) + f"{speedup:11.2f}{copies:11.2f}")
        result |= {f"speedup_{dtype}": speedup, f"copy_ratio_{dtype}": copies}
    if options.json:
        options.json.write_text(json.dumps(result | {"copy_ratio": result["copy_ratio_fp32"]}, indent=2) + "\n")


def work_of(who: str, dtype_name: str) -> Callable[[], object]:
    """One forward and backward of `who`."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(dtype)
    if who == "copy":
        moved = 3 * x.numel() + 2 * x.numel() * CHANNELS // SHAPE[1]
        source = torch.randn(moved // 2).to(dtype)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    activation = ours() if who == "ours" else peers()
    x.requires_grad_()
    grad = torch.randn(SHAPE[0], CHANNELS, *SHAPE[2:]).to(dtype)

    def step() -> None:
        x.grad = None
        activation(x).backward(grad)

    return step


def ours() -> torch.nn.Module:
    from fluxflow_train.models.bezier import BezierActivation

    return BezierActivation("tanh", "silu", "interleaved")


def peers() -> torch.nn.Module:
    activations: Any = import_module("fluxflow.models.activations")  # by name: no dependency, and without types
    if version("fluxflow") != "0.8.1":
        raise SystemExit(f"the peer is fluxflow 0.8.1, found {version('fluxflow')}")
    return activations.BezierActivation(t_pre_activation="tanh", p_preactivation="silu")


if __name__ == "__main__":
    main()
