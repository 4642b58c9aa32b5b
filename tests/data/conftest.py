"""One prepared OpenMoji folder for the session, and small tars made of given members."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxflow_train.data.sources.openmoji import OpenMoji
from fluxflow_train.models.vae import VAE, Decoder, Encoder


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> OpenMoji:
    source = OpenMoji(str(tmp_path_factory.mktemp("openmoji")))
    source.prepare()
    return source


@pytest.fixture(scope="session")
def vae() -> VAE:
    """Small, stride 4, with latent statistics that are not those of a standard normal."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(4, [8, 8], 4, 1, "bezier", "plain", 4)
        decoder = Decoder(4, [8, 8], 4, 3, 5, 8, 1, 2, 8, [8], "bezier", "relu", "plain", 4, 1.0)
        torch.nn.init.normal_(encoder.logvar[-1].weight)  # type: ignore[arg-type]
    made = VAE(encoder, decoder).eval()
    made.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    made.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """An image of noise around a colour that depends on `seed`, encoded."""

    def encode(seed: int = 0, size: tuple[int, int] = (24, 16), format: str = "PNG", **options: object) -> bytes:
        draws = np.random.default_rng(seed)
        pixels = draws.integers(0, 256, 3) // 2 + draws.integers(0, 64, (size[1], size[0], 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write (name, bytes) members, in Python's default PAX format unless told."""

    def write(members: list[tuple[str, bytes]], name: str = "shard.tar", format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def pairs(encoded: Callable[..., bytes]) -> Callable[[int], list[tuple[str, bytes]]]:
    """Members of `count` sound samples: 0000.png, 0000.txt, 0001.png ..."""

    def make(count: int, first: int = 0) -> list[tuple[str, bytes]]:
        members = []
        for number in range(first, first + count):
            members += [(f"{number:04d}.png", encoded(number)), (f"{number:04d}.txt", f"caption {number}".encode())]
        return members

    return make
