"""From sample numbers to a batch: what a worker process does.

B batch, R resolution of the square images.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from fluxflow_train import rng
from fluxflow_train.data.captions import choose
from fluxflow_train.data.images import BadImage, Decode, decode_image
from fluxflow_train.data.selection import Selection
from fluxflow_train.errors import UserError

Request = list[tuple[int, int]]
"""(epoch, sample) of each image of a batch."""


class Fetched(NamedTuple):
    """A batch as it leaves the worker. Errors travel as data: raised there, they would arrive as a traceback."""

    batch: dict[str, Any]
    damaged: dict[int, str]  # cause by sample, of those met in making this batch
    error: str


class View(Protocol):
    """What is shown of a sample: its image (3, R, R) and one of its captions."""

    def __call__(self, image: np.ndarray, captions: list[str], epoch: int, sample: int) -> tuple[np.ndarray, str]: ...


class PlainView:
    """For evaluation: the image as it is, the first caption."""

    def __call__(self, image: np.ndarray, captions: list[str], epoch: int, sample: int) -> tuple[np.ndarray, str]:
        return image, captions[0] if captions else ""


@dataclass(frozen=True)
class RandomView:
    """For training: flipped left to right with `flip_prob`, one of the captions; drawn from (seed, epoch, sample)."""

    seed: int
    flip_prob: float

    def __post_init__(self) -> None:
        if not 0 <= self.flip_prob <= 1:
            raise ValueError(f"flip_prob: got {self.flip_prob}, expected 0 to 1")

    def __call__(self, image: np.ndarray, captions: list[str], epoch: int, sample: int) -> tuple[np.ndarray, str]:
        # Streams of their own, so that one option doesn't change what another draws; none is made for nothing.
        if self.flip_prob and rng.generator(self.seed, "flip", epoch, sample).random() < self.flip_prob:
            image = image[:, :, ::-1]
        if len(captions) > 1:
            return image, choose(captions, rng.generator(self.seed, "caption", epoch, sample))
        return image, captions[0] if captions else ""


class BatchReader(Dataset[Fetched]):
    """Reads, decodes and collates one batch per request.

    A batch is image uint8 (B, 3, R, R), index and epoch int64 (B,), key and caption lists of B.

    In place of a sample whose image turns out damaged stands the next one that is whole, so a batch keeps its size
    and stays the same on any number of workers.
    """

    def __init__(self, selection: Selection, resolution: int, decode: Decode, view: View, cache_bytes: int) -> None:
        self.selection = selection
        self.resolution = resolution
        self.decode: Decode = decode
        self.view = view
        # Only a dataset that fits as a whole is worth keeping: part of it would be seldom hit.
        self._keep = len(selection) * 3 * resolution**2 <= cache_bytes
        self._decoded: dict[int, np.ndarray] = {}
        self._damaged: dict[int, str] = {}

    def __getitem__(self, request: Request) -> Fetched:
        damaged: dict[int, str] = {}
        images, rows, captions = [], [], []
        try:
            for epoch, wanted in request:
                sample, image = self._whole(wanted, damaged)
                row = self.selection.row(sample)
                image, caption = self.view(image, self.selection.index.captions(row), epoch, sample)
                images.append(image)
                captions.append(caption)
                rows.append((epoch, sample, self.selection.index.key(row)))
        except UserError as error:
            return Fetched({}, damaged, str(error))
        epochs, samples, keys = zip(*rows, strict=True)
        batch = {
            "image": torch.from_numpy(np.stack(images)),
            "index": torch.tensor(samples, dtype=torch.int64),
            "epoch": torch.tensor(epochs, dtype=torch.int64),
            "key": list(keys),
            "caption": captions,
        }
        return Fetched(batch, damaged, "")

    def _whole(self, wanted: int, damaged: dict[int, str]) -> tuple[int, np.ndarray]:
        """The first sample from `wanted` on whose image can be used, and that image."""
        for step in range(len(self.selection)):
            sample = (wanted + step) % len(self.selection)
            if sample in self._decoded:
                return sample, self._decoded[sample]
            if sample not in self._damaged:
                try:
                    data = self.selection.index.image(self.selection.row(sample))
                    image = decode_image(data, self.resolution, self.decode, self.selection.policy.limits)
                except BadImage as error:
                    self._damaged[sample] = str(error)
                else:
                    if self._keep:
                        self._decoded[sample] = image
                    return sample, image
            damaged[sample] = self._damaged[sample]
        raise UserError("no image of the dataset can be decoded: run scripts/check_shards.py on the shards")
