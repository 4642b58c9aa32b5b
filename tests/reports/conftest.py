"""A small VAE and small data for the reports: 16 x 16 pixels through an 8 x 4 x 4 latent."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxflow_train.metrics import features
from fluxflow_train.models.vae import VAE, Decoder, Encoder
from fluxflow_train.reports.build import evaluate_vae

HOSTILE = """<script>alert('x')</script>"><img src=x onerror=alert(1)>"""
PROVENANCE = {
    "command": "python -m fluxflow_train +experiment=vae_bezier 'seed=1 & <b>'",
    "model": {"experiment": "vae_bezier", "images_seen": 4096, "ema": True},
    "reference": {"dataset": "blobs"},
    "environment": {"git": "0123abc"},
    "cost": {"seconds_training": 12.5},
}


class Blobs:
    """Smooth random images on white, as a data module offers them."""

    def __init__(self, num_train: int, num_test: int, batch_size: int):
        self.parts = {"train": self.draw(num_train, 0), "test": self.draw(num_test, 1)}
        self.batch_size = batch_size

    @staticmethod
    def draw(num: int, seed: int) -> Tensor:
        coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.interpolate(coarse, (16, 16), mode="bicubic")
        image = smooth.mul(255).clamp(0, 255).byte()
        image[:, :, :2] = 255
        return image

    def num_samples(self, split: str) -> int:
        return len(self.parts[split])

    def eval_dataloader(self, split: str) -> Iterator[dict[str, Any]]:
        image = self.parts[split]
        for index in torch.arange(len(image)).split(self.batch_size):
            yield {
                "image": image[index],
                "index": index,
                "epoch": torch.zeros_like(index),
                "key": [f"blob-{i}" for i in index],
                "caption": [HOSTILE] * len(index),
            }


def small_vae() -> VAE:
    torch.manual_seed(0)
    encoder = Encoder(8, [8, 8], 4, 1, "bezier", "bezier", 4)
    return VAE(encoder, Decoder(8, [8, 8], 4, 3, 5, 8, 1, 2, 8, [8], "bezier", "relu", "bezier", 4, 0.1))


def write_metrics(folder: Path) -> None:
    rows = ["images_seen,train/loss,train/psnr,val/psnr,custom/thing"]
    for i in range(1, 701):
        rows.append(f"{32 * i},{1 / i},{20 - 10 / i},,")
        if i % 100 == 0:
            rows.append(f"{32 * i},,,{19 - 10 / i},{i}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Evaluates the small VAE; words replace parts of `PROVENANCE`."""

    def run(train: int, test: int, batch_size: int = 32, vae: VAE | None = None, **words: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        write_metrics(folder)
        data = Blobs(train, test, batch_size)
        return evaluate_vae(vae or small_vae(), data, folder, device="cpu", seed=0, provenance=PROVENANCE | words)

    return run


@pytest.fixture(scope="session")
def report(evaluate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A complete one, with the extractor where it is installed. Not to be changed: copy it first."""
    return evaluate(96, 66)


@pytest.fixture
def without_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the `demo` extra."""
    monkeypatch.setattr(features, "available", lambda: False)


@pytest.fixture
def vae() -> VAE:
    return small_vae()


@pytest.fixture
def data() -> Blobs:
    return Blobs(20, 10, 4)
