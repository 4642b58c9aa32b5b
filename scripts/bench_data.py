"""How fast images come: ours, webdataset's own pipeline, a plain PIL loader and the bare JPEG decoder; and how long a
training waits for them.

    python scripts/bench_data.py [--images 192] [--rounds 9] [--json]

Images per CPU-second of one process, the sides in alternation, each in its best round:
  ceiling_fraction   ours from 1024 to 256 px with decode=draft1x, as a part of the bare decoder at that draft
  webdataset_ratio   ours from 512 to 256 px, exact, to webdataset with the very same decoding
  wait_share         of the time of `+experiment=vae_bezier data.num_workers=1`, what passes waiting for a batch
and psnr_draft1x, psnr_draft2x: what the fast paths cost, in dB to the exact image at 1024 to 256 px.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.images import Decode, ImageLimits, decode_image
from fluxflow_train.data.loader import TrainLoader
from fluxflow_train.data.sources.shards import Shards

BATCH = 32
TARGET = 256
LIMITS = ImageLimits()


def photo(seed: int, side: int) -> bytes:
    """A JPEG with the spectrum of a photograph: noise at every scale, less the finer it is."""
    draws = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for octave in range(2, 10):
        coarse = Image.fromarray((draws.random((2**octave, 2**octave, 3)) * 255).astype(np.uint8))
        total += (np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128) / 1.6**octave
    image = Image.fromarray(np.clip(total * 1.5 + 128, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, image in enumerate(images):
            for extension, data in (("jpg", image), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def ours(path: Path, count: int, decode: Decode) -> Callable[[], Iterable[Any]]:
    data = ImageData(
        Shards(str(path), str(path)),
        TARGET,
        BATCH,
        count,
        seed=0,
        decode=decode,
        cache_dir=str(path.parent),
        cache_bytes=0,
    )
    data.prepare_data()
    return data.train_dataloader


def theirs(path: Path, decode: Decode) -> Callable[[], Iterable[Any]]:
    def decoded(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        pixels = decode_image(sample["jpg"], (TARGET, TARGET), decode, LIMITS)
        return torch.from_numpy(pixels), sample["txt"].decode()

    pipeline = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(100).map(decoded)  # type: ignore[attr-defined]
    return lambda: DataLoader(pipeline, batch_size=BATCH)


class Files(Dataset[torch.Tensor]):
    """What most training scripts do: a file per image, opened, resized and cut by PIL."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        image = Image.open(self.paths[number]).convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def bare(images: list[bytes], draft: int | None) -> Callable[[], Iterable[Any]]:
    """The decoder alone, from memory, its pixels thrown away."""

    def decode() -> Iterator[None]:
        for data in images:
            image = Image.open(io.BytesIO(data))
            if draft:
                image.draft(None, (draft, draft))
            image.load()
            yield

    return decode


def rates(sides: dict[str, Callable[[], Iterable[Any]]], count: int, rounds: int) -> dict[str, float]:
    """Images per CPU-second of each side in its best round: whatever else runs on the machine only ever costs time."""
    found = dict.fromkeys(sides, 0.0)
    for number in range(rounds + 1):
        for name, make in sides.items():
            start = time.process_time()
            for _ in make():
                pass
            if number:  # the first round warms up
                found[name] = max(found[name], count / (time.process_time() - start))
    return found


def psnr(images: list[bytes], decode: Decode) -> float:
    errors = []
    for data in images[:16]:
        exact, fast = (decode_image(data, (TARGET, TARGET), d, LIMITS).astype(float) for d in ("exact", decode))
        errors.append(np.square(exact - fast).mean())
    return 10 * np.log10(255**2 / np.mean(errors))


def wait_share(images: int) -> float:
    """Of a default run's training, without its first batch, which starts the worker."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from fluxflow_train import ranks
    from fluxflow_train.cli import config_folder
    from fluxflow_train.run import fit, opened

    waited, spent, plain = [0.0], [0.0], TrainLoader.__iter__

    def timed(self: TrainLoader) -> Iterator[dict[str, Any]]:
        inner = plain(self)
        yield next(inner)
        begun = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(inner, None)
            waited[0] += time.perf_counter() - asked
            spent[0] = time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(config_folder()), version_base=None):
        overrides = ["+experiment=vae_bezier", "data.num_workers=1", f"budget.images={images}", f"run={folder}/run"]
        overrides += [f"scale.validate_every={10 * images}"]
        cfg = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)  # as its command has it
        with open_dict(cfg):
            del cfg["hydra"]
        TrainLoader.__iter__ = timed  # type: ignore[method-assign]
        with ranks.process_group(ranks.backend()) as here:
            fit(*opened(cfg, here), here)
    return waited[0] / spent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, help="of each size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--train-images", type=int, default=4000, help="of the training run (%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, count = Path(place), options.images // BATCH * BATCH
        large = [photo(seed, 1024) for seed in range(count)]
        small = [photo(seed, 512) for seed in range(count)]
        write_tar(folder / "large.tar", large)
        write_tar(folder / "small.tar", small)
        (folder / "files").mkdir()
        for number, data in enumerate(small):
            (folder / "files" / f"{number:06d}.jpg").write_bytes(data)
        fast = rates(
            {
                "bare decoder, draft to 256": bare(large, TARGET),
                "bare decoder, whole": bare(large, None),
                "ours, draft1x": ours(folder / "large.tar", count, "draft1x"),
                "ours, draft2x": ours(folder / "large.tar", count, "draft2x"),
                "ours, exact": ours(folder / "large.tar", count, "exact"),
            },
            count,
            options.rounds,
        )
        equal = rates(
            {
                "bare decoder, whole": bare(small, None),
                "ours, exact": ours(folder / "small.tar", count, "exact"),
                "webdataset, the same decoding": theirs(folder / "small.tar", "exact"),
                "files with PIL": lambda: DataLoader(Files(folder / "files"), batch_size=BATCH),
            },
            count,
            options.rounds,
        )
        result = {
            "ceiling_fraction": fast["ours, draft1x"] / fast["bare decoder, draft to 256"],
            "webdataset_ratio": equal["ours, exact"] / equal["webdataset, the same decoding"],
            "psnr_draft1x": psnr(large, "draft1x"),
            "psnr_draft2x": psnr(large, "draft2x"),
            "images_per_cpu_second": {"1024 to 256": fast, "512 to 256": equal},
        }
    torch.set_num_threads(torch.get_num_interop_threads())
    result["wait_share"] = wait_share(options.train_images)
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for title, sides in (("1024 to 256", fast), ("512 to 256", equal)):
        print(f"{title} px, images per CPU-second")
        for name, rate in sides.items():
            print(f"  {name:32} {rate:8.1f}")
    for name in ("ceiling_fraction", "webdataset_ratio", "wait_share", "psnr_draft1x", "psnr_draft2x"):
        print(f"{name:20} {result[name]:.3f}")


if __name__ == "__main__":
    main()
