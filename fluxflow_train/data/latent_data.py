"""The data of a flow's run: the images' samples in the images' order, as latents and hidden states of their captions.

B batch, D latent channels, h w latent grid, S text tokens, W width of the text backbone.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.data.buckets import Buckets
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.images import BadImage
from fluxflow_train.data.latent_cache import Latent, LatentCache, latent_folder
from fluxflow_train.data.latent_writer import Posterior, write_latents
from fluxflow_train.data.loader import EvalLoader, TrainLoader
from fluxflow_train.data.lock import claim, held
from fluxflow_train.data.reader import NO_CAPTION, BatchReader, PlainView, Shown, View
from fluxflow_train.data.selection import Selection
from fluxflow_train.data.sources import SPLITS, Source, Split
from fluxflow_train.data.text_cache import TextCache
from fluxflow_train.errors import UserError
from fluxflow_train.hardware import device_of
from fluxflow_train.models.text import Backbone

CAPTIONS_PER_PART = 65_536  # that a process encodes while others are at other parts
TOKENS_MULTIPLE = 8  # S is rounded up to it, so that few shapes occur


class LatentReader(BatchReader[Latent]):
    """Batches with `latent_mean` and `latent_logvar` float32 (B, D, h, w) in place of the image.

    With a text cache also `text_hidden` float32 (B, S, W), zero where not valid, and `text_mask` bool (B, S).
    """

    def __init__(
        self, selection: Selection, buckets: Buckets, view: View, latents: LatentCache, text: TextCache | None
    ) -> None:
        super().__init__(selection, buckets, view)
        self.latents = latents
        self.text = text

    @property
    def identity(self) -> dict[str, str]:
        text = {} if self.text is None else {"text_fingerprint": self.text.fingerprint}
        return {**super().identity, "vae_sha256": self.latents.vae_sha256, **text}

    def content(self, sample: int, shown: Shown) -> Latent:
        if sample in self.latents.damaged:
            raise BadImage(self.latents.damaged[sample])
        return self.latents.read(sample, shown.flipped)

    def collate(self, contents: list[Latent], captions: list[str]) -> dict[str, Tensor]:
        means, logvars = zip(*contents, strict=True)
        tensors = {"latent_mean": torch.stack(means), "latent_logvar": torch.stack(logvars)}
        if self.text is not None:
            hidden, mask = self.text.lookup(captions)
            missing = -mask.shape[1] % TOKENS_MULTIPLE
            tensors["text_hidden"] = F.pad(hidden, (0, 0, 0, missing))
            tensors["text_mask"] = F.pad(mask, (0, missing))
        return tensors


class LatentData(LightningDataModule):
    """`images` as latents of `vae`, with the hidden states of `backbone`; both frozen, each computed once, in `root`.

    Samples, their order, flips and captions are those of `images`, so training on latents is training on images.
    Only `data.decode` does not show: latents are of exactly decoded images.

    A backbone that is itself trained has no hidden states to keep: pass `backbone=None`, and batches come without
    `text_hidden` and `text_mask`; the captions are in them as always.
    """

    def __init__(
        self,
        images: ImageData,
        vae: nn.Module,
        vae_sha256: str,
        backbone: Backbone | None,
        root: str,
        device: str,
    ) -> None:
        """`vae_sha256` is of the weights of `vae`; `prepare_data` runs the two networks on `device` ("auto" too)."""
        super().__init__()
        if images.training_view.cropped:
            raise ValueError("data.crop: got random, but cached latents are of the centre; set data.crop=center")
        if backbone is not None and not backbone.frozen:
            raise ValueError("backbone: got one that is trained, expected a frozen one, or None")
        self.image_data = images
        self.vae = vae
        self.vae_sha256 = vae_sha256
        self.backbone = backbone
        self.device = str(device_of(device))
        self._root = Path(root).expanduser()
        self._latents: dict[Split, LatentCache] = {}
        self._text: TextCache | None = None

    @property
    def batch_size(self) -> int:
        return self.image_data.batch_size

    @property
    def num_batches(self) -> int:
        return self.image_data.num_batches

    @property
    def seed(self) -> int:
        return self.image_data.seed

    @property
    def resolution(self) -> int:
        return self.image_data.resolution

    @property
    def source(self) -> Source:
        return self.image_data.source

    def prepare_data(self) -> None:
        """Write the images' shards and indices, the latents and the hidden states, where missing.

        Lightning runs it on one process of each node; the others open what it left.
        """
        self.image_data.prepare_data()
        with _placed(self.vae, self.device):
            for split in SPLITS:
                write_latents(
                    self._latent_folder(split),
                    self.image_data.selection(split),
                    self.image_data.buckets(split),
                    cast(Posterior, self.vae.posterior),
                    vae_sha256=self.vae_sha256,
                    device=self.device,
                    num_workers=self.image_data.num_workers,
                    tolerant=split == "train",
                )
        if self.backbone is not None:
            self._prepare_text(self.backbone)

    def latents(self, split: Split) -> LatentCache:
        """The latents of `split`; opened once. Raises UserError before `prepare_data`."""
        if split not in self._latents:
            self._latents[split] = LatentCache.open(
                self._latent_folder(split),
                vae_sha256=self.vae_sha256,
                fingerprint=self.image_data.selection(split).fingerprint,
                buckets=self.image_data.buckets(split).fingerprint,
                cache_bytes=self.image_data.cache_bytes,
            )
        return self._latents[split]

    def text(self) -> TextCache | None:
        """The hidden states of all captions; opened once. Raises UserError before `prepare_data`."""
        if self._text is None and self.backbone is not None:
            self._text = TextCache.open(self._text_folder(self.backbone))
            self._text.check(self.backbone.fingerprint)
        return self._text

    def train_dataloader(self) -> TrainLoader:
        """This process's share of each of the `num_batches` global batches."""
        return self.image_data.train_loader(self._reader("train", self.image_data.training_view))

    def val_dataloader(self) -> EvalLoader:
        """The tune split: what choices are made on."""
        return self.eval_dataloader("tune")

    def eval_dataloader(self, split: Split) -> EvalLoader:
        """Every sample of `split` once over all processes, not flipped, with its first caption."""
        return self.image_data.eval_loader(split, self._reader(split, PlainView()))

    def num_samples(self, split: Split) -> int:
        """Samples of `split` over all processes: what an evaluation's gathered count must equal."""
        return self.image_data.num_samples(split)

    def caption(self, split: Split, sample: int) -> str:
        """The first caption of a sample; "" where it has none."""
        return self.image_data.caption(split, sample)

    def images(self, split: Split, samples: Sequence[int]) -> Tensor:
        """Those samples of `split` as an evaluation sees them: uint8 (N, 3, R, R)."""
        return self.image_data.images(split, samples)

    def _reader(self, split: Split, view: View) -> LatentReader:
        selection, buckets = self.image_data.selection(split), self.image_data.buckets(split)
        return LatentReader(selection, buckets, view, self.latents(split), self.text())

    def _latent_folder(self, split: Split) -> Path:
        images = [self.image_data.selection(each).fingerprint for each in SPLITS]
        shapes = [self.image_data.buckets(each).fingerprint for each in SPLITS]
        return latent_folder(self._root, self.vae_sha256, images + shapes) / split

    def _text_folder(self, backbone: Backbone) -> Path:
        return self._root / f"text-{backbone.fingerprint[:16]}"

    def _prepare_text(self, backbone: Backbone) -> None:
        """Every process takes parts that no other has; what another was killed at is done by the others."""
        folder, fingerprint = self._text_folder(backbone), backbone.fingerprint
        captions = list(dict.fromkeys(c for split in SPLITS for c in _captions(self.image_data.selection(split))))
        if not TextCache.create(folder, fingerprint).missing(captions):
            return
        parts: list[list[str]] = [[] for _ in range(-(-len(captions) // CAPTIONS_PER_PART))]
        for caption in captions:
            parts[zlib.crc32(caption.encode("utf-8", "replace")) % len(parts)].append(caption)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            claims = [folder / f".part-{number}-of-{len(parts)}.lock" for number in range(len(parts))]
            with _placed(backbone, self.device), torch.no_grad():
                for part, path in zip(parts, claims, strict=True):
                    with claim(path) as mine:
                        if mine:
                            TextCache.create(folder, fingerprint).extend(part, backbone.encode)
                for part, path in zip(parts, claims, strict=True):
                    with held(path, "encoding captions"):
                        TextCache.create(folder, fingerprint).extend(part, backbone.encode)
        except OSError as error:
            raise UserError(f"can't write the text cache to {folder}: {error}; choose another data root") from error
        self._text = None  # what was open doesn't know of the new ones


def _captions(selection: Selection) -> Iterator[str]:
    """All captions of the samples, and the empty one where a sample has none."""
    for sample in range(len(selection)):
        yield from selection.index.captions(selection.row(sample)) or [NO_CAPTION]


@contextmanager
def _placed(module: nn.Module, device: str) -> Iterator[None]:
    """`module` on `device`, in evaluation mode; then back where it was."""
    before = next(chain(module.parameters(), module.buffers())).device
    module.to(device).eval()
    try:
        yield
    finally:
        module.to(before)
