"""From sample numbers to a batch: what a worker process does.

B batch, R resolution of the square images.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fluxflow_train import rng
from fluxflow_train.data.captions import choose
from fluxflow_train.data.images import BadImage, Decode, decode_image
from fluxflow_train.data.selection import Selection
from fluxflow_train.errors import UserError

Request = list[tuple[int, int]]
"""(epoch, sample) of each image of a batch."""

NO_CAPTION = ""
Content = TypeVar("Content")


class Fetched(NamedTuple):
    """A batch as it leaves the worker. Errors travel as data: raised there, they would arrive as a traceback."""

    batch: dict[str, Any]
    damaged: dict[int, str]  # cause by sample, of those met in making this batch
    error: str


class View(Protocol):
    """How a sample is shown: whether flipped left to right, and with which of its captions."""

    def __call__(self, captions: list[str], epoch: int, sample: int) -> tuple[bool, str]: ...


class PlainView:
    """For evaluation: the image as it is, the first caption."""

    def __call__(self, captions: list[str], epoch: int, sample: int) -> tuple[bool, str]:
        return False, captions[0] if captions else NO_CAPTION


@dataclass(frozen=True)
class RandomView:
    """For training: flipped left to right with `flip_prob`, one of the captions; drawn from (seed, epoch, sample)."""

    seed: int
    flip_prob: float

    def __post_init__(self) -> None:
        if not 0 <= self.flip_prob <= 1:
            raise ValueError(f"flip_prob: got {self.flip_prob}, expected 0 to 1")

    def __call__(self, captions: list[str], epoch: int, sample: int) -> tuple[bool, str]:
        # Streams of their own, so that one option doesn't change what another draws; none is made for nothing.
        flipped = bool(self.flip_prob and rng.generator(self.seed, "flip", epoch, sample).random() < self.flip_prob)
        if len(captions) > 1:
            return flipped, choose(captions, rng.generator(self.seed, "caption", epoch, sample))
        return flipped, captions[0] if captions else NO_CAPTION


class BatchReader(ABC, Dataset[Fetched], Generic[Content]):
    """Reads and collates one batch per request; subclasses say what of a sample beside its caption.

    A batch is index and epoch int64 (B,), key and caption lists of B, and what the subclass adds.

    In place of a sample whose image turns out damaged stands the next one that is whole, so a batch keeps its size
    and stays the same on any number of workers.
    """

    def __init__(self, selection: Selection, view: View) -> None:
        self.selection = selection
        self.view = view
        self._damaged: dict[int, str] = {}

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of all that the content of a batch is made from, by name: a resume needs the same."""
        return {"fingerprint": self.selection.fingerprint}

    @abstractmethod
    def content(self, sample: int, flipped: bool) -> Content:
        """What is read of one sample. Raises BadImage where it can't be used."""

    @abstractmethod
    def collate(self, contents: list[Content], captions: list[str]) -> dict[str, Tensor]:
        """The tensors of a batch."""

    def __getitem__(self, request: Request) -> Fetched:
        damaged: dict[int, str] = {}
        contents, captions, samples = [], [], []
        try:
            for epoch, wanted in request:
                sample, content, caption = self._whole(wanted, epoch, damaged)
                contents.append(content)
                captions.append(caption)
                samples.append(sample)
            tensors = self.collate(contents, captions)
        except UserError as error:
            return Fetched({}, damaged, str(error))
        batch = {
            **tensors,
            "index": torch.tensor(samples, dtype=torch.int64),
            "epoch": torch.tensor([epoch for epoch, _ in request], dtype=torch.int64),
            "key": [self.selection.index.key(self.selection.row(sample)) for sample in samples],
            "caption": captions,
        }
        return Fetched(batch, damaged, "")

    def _whole(self, wanted: int, epoch: int, damaged: dict[int, str]) -> tuple[int, Content, str]:
        """The first sample from `wanted` on that can be used, its content and its caption."""
        for step in range(len(self.selection)):
            sample = (wanted + step) % len(self.selection)
            if sample not in self._damaged:
                captions = self.selection.index.captions(self.selection.row(sample))
                flipped, caption = self.view(captions, epoch, sample)
                try:
                    return sample, self.content(sample, flipped), caption
                except BadImage as error:
                    self._damaged[sample] = str(error)
            damaged[sample] = self._damaged[sample]
        raise UserError("no image of the dataset can be decoded: run scripts/check_shards.py on the shards")


class ImageReader(BatchReader[np.ndarray]):
    """Batches with `image` uint8 (B, 3, R, R), decoded; kept decoded where the whole split fits `cache_bytes`."""

    def __init__(self, selection: Selection, resolution: int, decode: Decode, view: View, cache_bytes: int) -> None:
        super().__init__(selection, view)
        self.resolution = resolution
        self.decode: Decode = decode
        # Only a dataset that fits as a whole is worth keeping: part of it would be seldom hit.
        self._keep = len(selection) * 3 * resolution**2 <= cache_bytes
        self._decoded: dict[int, np.ndarray] = {}

    def content(self, sample: int, flipped: bool) -> np.ndarray:
        image = self._decoded.get(sample)
        if image is None:
            data = self.selection.index.image(self.selection.row(sample))
            image = decode_image(data, self.resolution, self.decode, self.selection.policy.limits)
            if self._keep:
                self._decoded[sample] = image
        return image[:, :, ::-1] if flipped else image

    def collate(self, contents: list[np.ndarray], captions: list[str]) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(np.stack(contents))}
