"""Programs timed in alternation, each in a process (and, if need be, an environment) of its own.

A worker repeats one piece of work whenever it is told to and answers with the seconds it took and its peak memory.
Taking turns, the contenders see the same machine in the same state; the medians are what is compared.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent


class Measurement(NamedTuple):
    """Seconds of each round; the highest resident memory of the process, MiB."""

    seconds: list[float]
    peak_mib: float

    @property
    def median(self) -> float:
        return median(self.seconds)


def serve(work: Callable[[], object]) -> None:
    """The worker's side: do `work` for each line that comes."""
    for _ in sys.stdin:
        reply(timed(work))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reply(seconds: float) -> None:
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib}), flush=True)


class Worker:
    """`python script *arguments`, which ends in `serve` (or answers each line with `reply`)."""

    def __init__(self, python: str, script: Path, *arguments: str):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        self.name = " ".join(arguments)
        self.process = subprocess.Popen(
            [python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()

    def round(self) -> dict[str, float]:
        """One piece of work. Raises: SystemExit if the worker has died; its own message stands above."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SystemExit(f"the worker {self.name!r} ended early") from None
        for line in self.process.stdout:
            if line.startswith("{"):  # anything else is chatter of the program under test
                return json.loads(line)
        raise SystemExit(f"the worker {self.name!r} ended early")


def alternate(workers: Mapping[str, Worker], rounds: int, warmup: int) -> dict[str, Measurement]:
    """`warmup` rounds that don't count, then `rounds` that do, one worker after the other."""
    answers = [{name: worker.round() for name, worker in workers.items()} for _ in range(warmup + rounds)]
    return {
        name: Measurement([a[name]["seconds"] for a in answers[warmup:]], max(a[name]["peak_mib"] for a in answers))
        for name in workers
    }


def machine(versions: Mapping[str, str]) -> str:
    """Where and with what the numbers were taken."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    bf16 = ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags) or "no bf16 instructions"
    load = os.getloadavg()[0]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{model}, {os.cpu_count()} cores, {bf16}, load {load:.1f}; python {platform.python_version()}, {named}"
