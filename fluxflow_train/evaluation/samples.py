"""What is kept of every picture that a model made, beside its features: whether it is one, and whether it came twice.

N pictures, H W pixels.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fluxflow_train.files import replacing
from fluxflow_train.pictures import to_pil

PICTURES = "pictures"  # the folder of them
KEPT = 64  # pictures for the page


def picture_digests(images: Tensor) -> Tensor:
    """sha256 of the pixels, uint8 (N, 32), of uint8 (N, 3, H, W)."""
    digests = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images.cpu()]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).view(-1, 32)


def num_different(digests: Tensor) -> int:
    """How many rows of (N, 32) there are, each counted once."""
    return len({bytes(row) for row in digests.tolist()})


def keep_pictures(folder: Path, numbers: Sequence[int], images: Tensor) -> None:
    """PNGs of the first 64 numbers."""
    for number, image in zip(numbers, images, strict=True):
        if number < KEPT:
            with replacing(picture_path(folder, number)) as path:
                to_pil(image.cpu()).save(path, "PNG")


def kept_picture(folder: Path, number: int) -> Tensor:
    """uint8 (3, H, W)."""
    with Image.open(picture_path(folder, number)) as file:
        width, height = file.size
        pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1).contiguous()


def picture_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
