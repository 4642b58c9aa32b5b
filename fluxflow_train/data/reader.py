"""From sample numbers to a batch: what a worker process does.

B batch, H W pixels of its images: every sample of a request has the same shape.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fluxflow_train import rng
from fluxflow_train.data.buckets import Buckets
from fluxflow_train.data.captions import choose
from fluxflow_train.data.images import CENTRE, BadImage, Decode, decode_image
from fluxflow_train.data.selection import Selection
from fluxflow_train.errors import UserError

Request = list[tuple[int, int]]
"""(epoch, sample) of each image of a batch."""

NO_CAPTION = ""
Content = TypeVar("Content")


class Fetched(NamedTuple):
    """A batch as it leaves the worker. Errors travel as data: raised there, they would arrive as a traceback.

    Numpy arrays of `batch` become tensors in the main process.
    """

    batch: dict[str, Any]
    damaged: dict[int, str]  # cause by sample, of those met in making this batch
    error: str


class Shown(NamedTuple):
    """How a sample is shown: whether flipped left to right, which part of the image, with which of its captions."""

    flipped: bool
    place: tuple[float, float]  # in [0, 1]^2, see decode_image
    caption: str


class View(Protocol):
    """Decides how a sample is shown; `cropped`: whether images are shown elsewhere than at their centre."""

    @property
    def cropped(self) -> bool: ...

    def __call__(self, captions: list[str], epoch: int, sample: int) -> Shown: ...


class PlainView:
    """For evaluation: the centre of the image as it is, the first caption."""

    cropped = False

    def __call__(self, captions: list[str], epoch: int, sample: int) -> Shown:
        return Shown(False, CENTRE, captions[0] if captions else NO_CAPTION)


@dataclass(frozen=True)
class RandomView:
    """For training: flipped left to right with `flip_prob`, one of the captions, the centre or (`cropped`) any part.

    Drawn from (seed, epoch, sample).
    """

    seed: int
    flip_prob: float
    cropped: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.flip_prob <= 1:
            raise ValueError(f"flip_prob: got {self.flip_prob}, expected 0 to 1")

    def __call__(self, captions: list[str], epoch: int, sample: int) -> Shown:
        # Streams of their own, so that one option doesn't change what another draws; none is made for nothing.
        flipped = bool(self.flip_prob and rng.generator(self.seed, "flip", epoch, sample).random() < self.flip_prob)
        place = CENTRE
        if self.cropped:
            across, down = rng.generator(self.seed, "crop", epoch, sample).random(2).tolist()
            place = (across, down)
        if len(captions) > 1:
            return Shown(flipped, place, choose(captions, rng.generator(self.seed, "caption", epoch, sample)))
        return Shown(flipped, place, captions[0] if captions else NO_CAPTION)


class BatchReader(ABC, Dataset[Fetched], Generic[Content]):
    """Reads and collates one batch per request; subclasses say what of a sample beside its caption.

    A batch is index and epoch int64 (B,), key and caption lists of B, and what the subclass adds.

    In place of a sample whose image turns out damaged stands the next whole one of its bucket, so a batch keeps its
    size and its shape and stays the same on any number of workers.
    """

    def __init__(self, selection: Selection, buckets: Buckets, view: View) -> None:
        self.selection = selection
        self.buckets = buckets
        self.view = view
        self._damaged: dict[int, str] = {}

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of all that the content of a batch is made from, by name: a resume needs the same."""
        return {"fingerprint": self.selection.fingerprint}

    @abstractmethod
    def content(self, sample: int, shown: Shown) -> Content:
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
            "index": np.array(samples, np.int64),
            "epoch": np.array([epoch for epoch, _ in request], np.int64),
            "key": [self.selection.index.key(self.selection.row(sample)) for sample in samples],
            "caption": captions,
        }
        return Fetched(batch, damaged, "")

    def _whole(self, wanted: int, epoch: int, damaged: dict[int, str]) -> tuple[int, Content, str]:
        """The first sample from `wanted` on that can be used, its content and its caption."""
        for step in range(len(self.selection)):
            sample = (wanted + step) % len(self.selection)
            if self.buckets.of[sample] != self.buckets.of[wanted]:
                continue
            if sample not in self._damaged:
                captions = self.selection.index.captions(self.selection.row(sample))
                shown = self.view(captions, epoch, sample)
                try:
                    return sample, self.content(sample, shown), shown.caption
                except BadImage as error:
                    self._damaged[sample] = str(error)
            damaged[sample] = self._damaged[sample]
        raise UserError("no image of the dataset can be decoded: run scripts/check_shards.py on the shards")


class ImageReader(BatchReader[np.ndarray]):
    """Batches with `image` uint8 (B, 3, H, W), decoded; kept decoded where the whole split fits `cache_bytes`."""

    def __init__(self, selection: Selection, buckets: Buckets, decode: Decode, view: View, cache_bytes: int) -> None:
        super().__init__(selection, buckets, view)
        self.decode: Decode = decode
        # Only a dataset that fits as a whole is worth keeping: part of it would be seldom hit.
        self._keep = 3 * buckets.num_pixels() <= cache_bytes and not view.cropped
        self._decoded: dict[int, np.ndarray] = {}

    def content(self, sample: int, shown: Shown) -> np.ndarray:
        image = self._decoded.get(sample)
        if image is None:
            data = self.selection.index.image(self.selection.row(sample))
            limits = self.selection.policy.limits
            image = decode_image(data, self.buckets.shape(sample), self.decode, limits, shown.place)
            if self._keep:
                self._decoded[sample] = image
        return image[:, :, ::-1] if shown.flipped else image

    def collate(self, contents: list[np.ndarray], captions: list[str]) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(np.stack(contents))}
