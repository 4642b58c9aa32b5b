"""What a large data set costs beside its images: memory and time of 1,000 shards of 1,000 tiny samples.

    python scripts/bench_index.py [--shards 1000] [--samples 1000] [--workers 3] [--batches 100] [--json]

Writes the shards to a temporary folder (2.5 GB), then in this process: builds the index, opens it, makes the order,
reads batches with workers, and goes on in the middle of the second epoch as a resumed run does. Memory is the
proportional set size of this process and all workers above what the interpreter had with everything imported.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from threading import Event, Thread

from PIL import Image

from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.sources.shards import Shards

BATCH = 256


def write_shard(path: Path, samples: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "JPEG")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            for extension, data in (("jpg", buffer.getvalue()), ("txt", f"caption {number}".encode())):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def memory() -> int:
    """Bytes of this process and those below it, shared pages counted once."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100, help="read before and after the resume (%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    total, peak, done = options.shards * options.samples, {"": 0}, Event()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shard(folder / "0000.tar", options.samples)
        for number in range(1, options.shards):
            shutil.copy(folder / "0000.tar", folder / f"{number:04d}.tar")
        pattern = f"{folder}/{{0000..{options.shards - 1:04d}}}.tar"

        def data() -> ImageData:
            return ImageData(
                Shards(pattern, str(folder / "0000.tar")),
                16,
                BATCH,
                3 * total,
                seed=0,
                num_workers=options.workers,
                cache_dir=place,
                cache_bytes=0,
            )

        before = memory()

        def watch() -> None:
            while not done.wait(0.1):
                peak[""] = max(peak[""], memory())

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        times = {}
        clock = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            times[name] = time.perf_counter() - clock
            peak[name], peak[""] = max(peak[""], memory()) - before, 0
            clock = time.perf_counter()

        data().prepare_data()
        lap("index")
        opened = data()
        opened.prepare_data()
        lap("open")
        loader = opened.train_dataloader()
        for _ in islice(loader, options.batches):
            pass
        lap("first_batches")
        state = loader.state_dict() | {"batches_done": total * 3 // 2 // BATCH}
        del loader  # and its workers
        resumed = opened.train_dataloader()
        resumed.load_state_dict(state)
        for _ in islice(resumed, options.batches):
            pass
        lap("resumed_batches")
        done.set()
        watcher.join()
    result = {
        "samples": total,
        "seconds": times,
        "index_ms_per_sample": 1000 * times["index"] / total,
        "open_ms_per_sample": 1000 * times["open"] / total,
        "peak_extra_bytes": {name: size for name, size in peak.items() if name},
    }
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{total:,} samples in {options.shards:,} shards, {options.workers} workers")
    for name, seconds in times.items():
        print(f"  {name:22} {seconds:8.2f} s, at most {peak[name] / 2**20:5,.0f} MiB more than before")
    print(f"  index {result['index_ms_per_sample']:.4f} ms per sample, open {result['open_ms_per_sample']:.4f} ms")


if __name__ == "__main__":
    main()
