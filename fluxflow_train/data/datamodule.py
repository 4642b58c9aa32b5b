"""The data of a run, for Lightning: prepared once, ordered by the seed, resumed exactly."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch.distributed
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fluxflow_train.data.images import Decode, ImageLimits
from fluxflow_train.data.index import Index, open_table
from fluxflow_train.data.loader import EvalLoader, TrainLoader, checked
from fluxflow_train.data.progress import progress
from fluxflow_train.data.reader import BatchReader, ImageReader, PlainView, RandomView, View
from fluxflow_train.data.sampler import GlobalOrder, eval_batches
from fluxflow_train.data.selection import MissingCaption, Policy, Selection
from fluxflow_train.data.sources import SPLITS, Source, Split

log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """Square images of `resolution` pixels with captions; training is one pass of `budget_images` images.

    `batch_size` is the global one: the processes share each batch. `cache_bytes` bounds, per process, the decoded
    images that are kept where a whole split fits. `cache_dir` takes indices of shards whose own folder is read-only.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        batch_size: int,
        budget_images: int,
        seed: int,
        num_workers: int = 0,
        flip_prob: float = 0.0,
        decode: Decode = "exact",
        window_shards: int = 16,
        missing_caption: MissingCaption = "keep",
        max_bad_fraction: float = 0.01,
        max_pixels: int = 64_000_000,
        min_side: int = 1,
        max_aspect: float = 20.0,
        cache_dir: str = "~/.cache/fluxflow_train",
        cache_bytes: int = 2**30,
    ) -> None:
        super().__init__()
        at_least_1 = {
            "resolution": resolution,
            "batch_size": batch_size,
            "budget_images": budget_images,
            "window_shards": window_shards,
        }
        for name, value in at_least_1.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if decode not in get_args(Decode):
            raise ValueError(f"decode: got {decode!r}, expected one of {get_args(Decode)}")
        self.source = source
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_batches = math.ceil(budget_images / batch_size)
        self.seed = seed
        self.num_workers = num_workers
        self.decode: Decode = decode
        self.window_shards = window_shards
        self.policy = Policy(ImageLimits(max_pixels, min_side, max_aspect), missing_caption, max_bad_fraction)
        self.training_view = RandomView(seed, flip_prob)
        self._cache_dir = Path(cache_dir).expanduser()
        self.cache_bytes = cache_bytes
        self._selections: dict[Split, Selection] = {}
        self._prepared = False

    def prepare_data(self) -> None:
        """Write the source's shards and the indices, where missing. Lightning runs it on one process of each node."""
        if self._prepared:
            return
        self.source.prepare()
        shards = dict.fromkeys(path for split in SPLITS for path in self.source.shards(split))
        for path in progress(shards, "Indexing shards", len(shards)):
            open_table(path, self._cache_dir)
        for split in SPLITS:
            _report(split, self.selection(split))
        self._prepared = True

    def selection(self, split: Split) -> Selection:
        """The usable samples of `split`; opened once."""
        if split not in self._selections:
            index = Index(self.source.shards(split), self._cache_dir)
            self._selections[split] = Selection(index, self.policy)
        return self._selections[split]

    def num_samples(self, split: Split) -> int:
        """Samples of `split` over all processes: what an evaluation's gathered count must equal."""
        return len(self.selection(split))

    def train_dataloader(self) -> TrainLoader:
        """This process's share of each of the `num_batches` global batches."""
        return self.train_loader(self._reader("train", self.decode, self.training_view, self._worker_bytes))

    def val_dataloader(self) -> EvalLoader:
        """The tune split: what choices are made on."""
        return self.eval_dataloader("tune")

    def eval_dataloader(self, split: Split) -> EvalLoader:
        """Every sample of `split` once over all processes, decoded exactly, not flipped, with its first caption.

        A damaged image is an error, except in the training split: there the next whole one stands in, as in training.
        """
        return self.eval_loader(split, self._reader(split, "exact", PlainView(), self._worker_bytes))

    def caption(self, split: Split, sample: int) -> str:
        """The first caption of a sample, as an evaluation sees it; "" where it has none."""
        selection = self.selection(split)
        return next(iter(selection.index.captions(selection.row(sample))), "")

    def images(self, split: Split, samples: Sequence[int]) -> Tensor:
        """Those samples of `split` as an evaluation sees them: uint8 (N, 3, R, R)."""
        reader = self._reader(split, "exact", PlainView(), cache_bytes=0)
        return checked(reader[[(0, sample) for sample in samples]])["image"]

    def train_loader(self, reader: BatchReader[Any]) -> TrainLoader:
        """The training order, over what `reader` makes of each sample of the training split."""
        order = GlobalOrder(self.seed, self.selection("train").shard_sizes, self.window_shards, self.batch_size)
        return TrainLoader(reader, order, self.num_batches, *_rank_and_world(), self.num_workers)

    def eval_loader(self, split: Split, reader: BatchReader[Any]) -> EvalLoader:
        """The evaluation order, over what `reader` makes of each sample of `split`."""
        batches = eval_batches(self.num_samples(split), self.batch_size, *_rank_and_world())
        return EvalLoader(reader, batches, self.num_workers, tolerant=split == "train")

    @property
    def _worker_bytes(self) -> int:
        return self.cache_bytes // max(1, self.num_workers)

    def _reader(self, split: Split, decode: Decode, view: View, cache_bytes: int) -> ImageReader:
        return ImageReader(self.selection(split), self.resolution, decode, view, cache_bytes)


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _report(split: Split, selection: Selection) -> None:
    """Say what the index met; nothing where all is well."""
    for text, counts in (
        ("damaged, left out", selection.damaged),
        ("left out by the limits", selection.left_out),
        ("noted", selection.noted),
    ):
        if +counts:
            log.warning("%s: %s: %s", split, text, ", ".join(f"{n} x {cause}" for cause, n in counts.items()))
    dotted = selection.index.dotted_keys
    if dotted:
        log.warning("%s: keys with dots, which other WebDataset readers merge: %s", split, ", ".join(dotted))
