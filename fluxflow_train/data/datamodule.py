"""The data of a run, for Lightning: prepared once, ordered by the seed, resumed exactly."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch.distributed
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxflow_train.data.buckets import BucketRule, Buckets
from fluxflow_train.data.captions import FIELDS
from fluxflow_train.data.download import Patience
from fluxflow_train.data.images import Decode, ImageLimits
from fluxflow_train.data.index import Index, open_tables
from fluxflow_train.data.line import Line, Part
from fluxflow_train.data.loader import EvalLoader, TrainLoader, checked
from fluxflow_train.data.reader import BatchReader, ImageReader, PlainView, RandomView, View
from fluxflow_train.data.sampler import GlobalOrder, eval_batches
from fluxflow_train.data.selection import MissingCaption, Policy, Selection
from fluxflow_train.data.shard_cache import ShardCache
from fluxflow_train.data.sources import SPLITS, Source, Split
from fluxflow_train.data.sources.mixture import Mixture
from fluxflow_train.errors import UserError

Crop = Literal["center", "random"]

log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """Images with captions; training is one pass of `budget_images` images.

    Evaluation sees squares of `resolution` pixels; so does training, unless `resolutions` or `bucket_aspect` ask for
    batches of several shapes (`BucketRule`). `batch_size` is the global one: the processes share each batch.
    `cache_bytes` bounds, per process, the decoded images that are kept where a whole split fits. `cache_dir` takes
    indices of shards whose own folder is read-only, and copies of remote shards, `remote_cache_bytes` at the most.
    `caption_fields` are where captions stand in JSON members (`parse_captions`).
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
        crop: Crop = "center",
        resolutions: Sequence[int] | None = None,
        bucket_aspect: float = 1.0,
        bucket_step: int = 16,
        bucket_share: float = 0.01,
        window_shards: int = 16,
        missing_caption: MissingCaption = "keep",
        max_bad_fraction: float = 0.01,
        max_pixels: int = 64_000_000,
        min_side: int = 1,
        max_aspect: float = 20.0,
        caption_fields: Sequence[str] = FIELDS,
        cache_dir: str = "~/.cache/fluxflow_train",
        cache_bytes: int = 2**30,
        remote_cache_bytes: int = 20 * 2**30,
        remote_deadline: float = 300.0,
        allow_pipe: bool = False,
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
        if crop not in get_args(Crop):
            raise ValueError(f"crop: got {crop!r}, expected one of {get_args(Crop)}")
        self.bucket_rule = None
        if resolutions is not None or bucket_aspect != 1:
            sides = (resolution,) if resolutions is None else tuple(resolutions)
            self.bucket_rule = BucketRule(sides, bucket_aspect, bucket_step, bucket_share)
        self.source = source
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_batches = math.ceil(budget_images / batch_size)
        self.seed = seed
        self.num_workers = num_workers
        self.decode: Decode = decode
        self.window_shards = window_shards
        self.policy = Policy(ImageLimits(max_pixels, min_side, max_aspect), missing_caption, max_bad_fraction)
        self.training_view = RandomView(seed, flip_prob, cropped=crop == "random")
        self._cache_dir = Path(cache_dir).expanduser()
        self._caption_fields = tuple(caption_fields)
        patience = Patience(remote_deadline)
        self._remote = ShardCache(self._cache_dir / "remote", remote_cache_bytes, patience, allow_pipe)
        self.cache_bytes = cache_bytes
        self._selections: dict[Split, Selection] = {}
        self._train_buckets: Buckets | None = None
        self._prepared = False

    def prepare_data(self) -> None:
        """Write the source's shards and the indices, where missing. Lightning runs it on one process of each node."""
        if self._prepared:
            return
        self.source.prepare()
        shards = [path for split in SPLITS for path in self.source.shards(split)]
        open_tables(shards, self._cache_dir, self._caption_fields, self._remote)
        for split in SPLITS:
            _report(split, self.selection(split))
        self._check_remote_space()
        for table in (self._mix_table(), self._bucket_table()):
            if table is not None:
                Console(stderr=True).print(table)
        self._prepared = True

    def selection(self, split: Split) -> Selection:
        """The usable samples of `split`; opened once."""
        if split not in self._selections:
            index = Index(self.source.shards(split), self._cache_dir, self._caption_fields, self._remote)
            self._selections[split] = Selection(index, self.policy)
        return self._selections[split]

    def buckets(self, split: Split) -> Buckets:
        """The shape of every sample of `split`; squares, except in training where `BucketRule` says otherwise."""
        selection = self.selection(split)
        if split != "train" or self.bucket_rule is None:
            return Buckets.square(self.resolution, len(selection))
        if self._train_buckets is None:
            width, height = selection.column("width"), selection.column("height")
            self._train_buckets = Buckets.by_rule(self.bucket_rule, width, height, self.batch_size)
        return self._train_buckets

    def num_samples(self, split: Split) -> int:
        """Samples of `split` over all processes: what an evaluation's gathered count must equal."""
        return len(self.selection(split))

    def train_dataloader(self) -> TrainLoader:
        """This process's share of each of the `num_batches` global batches."""
        selection, buckets = self.selection("train"), self.buckets("train")
        reader = ImageReader(selection, buckets, self.decode, self.training_view, self._worker_bytes)
        return self.train_loader(reader)

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
        line = Line(self.seed, [part for _, part in self._parts()], self.window_shards)
        order = GlobalOrder(line, reader.buckets.of, self.batch_size)
        return TrainLoader(reader, order, self.num_batches, *_rank_and_world(), self.num_workers)

    def eval_loader(self, split: Split, reader: BatchReader[Any]) -> EvalLoader:
        """The evaluation order, over what `reader` makes of each sample of `split`."""
        batches = eval_batches(self.num_samples(split), self.batch_size, *_rank_and_world())
        return EvalLoader(reader, batches, self.num_workers, tolerant=split == "train")

    @property
    def _worker_bytes(self) -> int:
        return self.cache_bytes // max(1, self.num_workers)

    def _reader(self, split: Split, decode: Decode, view: View, cache_bytes: int) -> ImageReader:
        buckets = Buckets.square(self.resolution, self.num_samples(split))
        return ImageReader(self.selection(split), buckets, decode, view, cache_bytes)

    def _parts(self) -> list[tuple[str, Part]]:
        """The datasets of the training split, by name. Raises UserError where one has no usable sample."""
        sizes = self.selection("train").shard_sizes
        if not isinstance(self.source, Mixture):
            return [("", Part(sizes))]
        parts, first = [], 0
        for name, num_shards, weight in self.source.datasets:
            part = Part(sizes[first : first + num_shards], weight)
            if not sum(part.shard_sizes):
                raise UserError(f"dataset {name} of data.mix has no usable sample: see what was left out above")
            parts.append((name, part))
            first += num_shards
        return parts

    def _check_remote_space(self) -> None:
        """Raises UserError where the copies of remote shards would push each other out all the time."""
        remote = self.selection("train").index.remote_bytes
        at_once = (self.window_shards + 1) * len(self._parts())
        need, have = sum(sorted(remote)[-at_once:]), self._remote.max_bytes
        if need > have:
            raise UserError(
                f"data.window_shards={self.window_shards} remote shards at once are up to {need:,} bytes, more than"
                f" data.remote_cache_bytes={have:,}: raise the one or lower the other"
            )

    def _mix_table(self) -> Table | None:
        """What each dataset of a mixture gives; None where there is only one."""
        parts = self._parts()
        if len(parts) == 1:
            return None
        table = Table("dataset", "shards", "images", "share", "epochs", title="Mixture")
        total = sum(part.weight for _, part in parts)
        for name, part in parts:
            images, share = sum(part.shard_sizes), part.weight / total
            epochs = share * self.num_batches * self.batch_size / images
            table.add_row(name, f"{len(part.shard_sizes)}", f"{images:,}", f"{share:.1%}", f"{epochs:.2f}")
        return table

    def _bucket_table(self) -> Table | None:
        """The buckets of training; None where all is square."""
        if self.bucket_rule is None:
            return None
        buckets = self.buckets("train")
        table = Table("height", "width", "aspect", "images", "share", title="Aspect-ratio buckets")
        for shape, count in zip(buckets.shapes, buckets.counts, strict=True):
            share = count / len(buckets.of)
            row = (shape.height, shape.width, f"{shape.aspect:.2f}", f"{count:,}", f"{share:.1%}")
            table.add_row(*map(str, row))
        return table


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
