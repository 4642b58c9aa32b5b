import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from alternation import serve
print("chatter")
serve(lambda: time.sleep(float(sys.argv[2])))
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_workers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from alternation import Worker, alternate  # type: ignore[import-not-found]

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with (
        Worker(sys.executable, script, str(SCRIPTS), "0.01") as a,
        Worker(sys.executable, script, str(SCRIPTS), "0") as b,
    ):
        taken = alternate({"a": a, "b": b}, rounds=3, warmup=1)
    assert [len(taken[name].seconds) for name in "ab"] == [3, 3]
    assert min(taken["a"].seconds) >= 0.01 and taken["b"].peak_mib > 1
    assert a.process.poll() is not None


def test_a_worker_that_dies_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from alternation import Worker  # type: ignore[import-not-found]

    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(3)")
    with Worker(sys.executable, script, "x") as worker, pytest.raises(SystemExit, match="ended early"):
        worker.round()


@pytest.mark.parametrize("script", ["bench_bezier.py", "bench_flow.py", "bench_vae.py"])
def test_help(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0 and "--peer-python" in done.stdout


def test_bench_index() -> None:
    done = run("bench_index.py", "--shards", 5, "--samples", 4, "--workers", 1, "--batches", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["samples"] == 20
    assert result["peak_extra_bytes"].keys() == result["seconds"].keys()


@pytest.mark.slow
def test_bench_data() -> None:
    done = run("bench_data.py", "--images", 32, "--rounds", 1, "--train-images", 96, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all(result[name] > 0 for name in ("ceiling_fraction", "webdataset_ratio", "wait_share"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "keys"),
    [
        ("bench_bezier.py", {"speedup_fp32", "speedup_bf16", "copy_ratio"}),
        ("bench_flow.py", {"train_speedup_bf16", "sample_speedup_fp32", "sample_speedup_bf16"}),
        ("bench_vae.py", {"speedup_fp32", "speedup_bf16", "memory_ratio", "peak_fraction"}),
    ],
)
def test_benchmark_writes_its_figures(script: str, keys: set[str], tmp_path: Path) -> None:
    pytest.importorskip("fluxflow_training", reason="the peer fluxflow-training==0.8.1 is not installed")
    done = run(script, "--rounds", 1, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert keys <= result.keys() and all(value > 0 for value in result.values())
