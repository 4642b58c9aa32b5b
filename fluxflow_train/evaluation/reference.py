"""Features of the real images of a protocol: made once, kept under data.root, checked before anything is drawn.

N images, F feature width, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.evaluation.extractors import describe
from fluxflow_train.evaluation.filling import discard_damaged, fill, refuse_damaged
from fluxflow_train.evaluation.images import Images
from fluxflow_train.evaluation.protocol import Protocol
from fluxflow_train.evaluation.ranks import Ranks
from fluxflow_train.evaluation.store import FeatureStore
from fluxflow_train.metrics.extractor import Extractor

FOLDER = "references"
MAX_TRAIN = 4096  # training images that PCA and neighbours are taken from
REDUCTION = 4  # of the degraded images, a side


@dataclass
class RealFeatures:
    """`features` and `degraded` (N, F) of `images`' first N; `sha256` of both."""

    features: Tensor
    degraded: Tensor
    sha256: str
    images: Images


class Reference:
    """The stores of a protocol's splits for one extractor, in `root`/references/."""

    def __init__(self, protocol: Protocol, extractor: Extractor, device: torch.device, root: Path) -> None:
        self.protocol, self.extractor, self.device = protocol, extractor, device
        self.folder = root / FOLDER / f"{protocol.hash[:16]}-{extractor.weights_sha256[:16]}"
        self.described = {key: value for key, value in describe(extractor).items() if key != "class"}

    def store(self, images: Images) -> FeatureStore:
        """Opened and compared. Raises UserError where it holds features of something else."""
        identity = {
            "protocol": self.protocol.hash,
            "split": images.split,
            "list_sha256": images.list_sha256,
            "data": images.selection.fingerprint,
            "extractor": self.described,
        }
        remedy = f"delete {self.folder}, or run prepare reference={self.protocol.id} again"
        return FeatureStore(self.folder / images.split, len(images), identity, remedy)

    def ensure(self, images: Images, count: int, ranks: Ranks) -> None:
        """Have features of the first `count`; those that are there are verified, those that lack are made.

        Raises:
            UserError: the store is damaged, or of something else.
        """
        ranks.first(lambda: refuse_damaged(self.store(images), count))
        self.fill(images, count, ranks)

    def prepare(self, images: Images, ranks: Ranks) -> None:
        """As `ensure`, of all images; damaged files are made again."""
        ranks.first(lambda: discard_damaged(self.store(images), len(images)))
        self.fill(images, len(images), ranks)

    def fill(self, images: Images, count: int, ranks: Ranks) -> None:
        fill(self.store(images), count, ranks, self.maker(images), f"features of {images.split}")

    def read(self, images: Images, count: int) -> RealFeatures:
        rows, sha256 = self.store(images).read(count)
        return RealFeatures(rows["features"], rows["degraded"], sha256, images)

    def maker(self, images: Images) -> Callable[[Sequence[range]], Iterator[dict[str, Tensor]]]:
        def make(chunks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
            for image in images.batches(chunks):
                image = image.to(self.device)
                yield {
                    "features": self.extractor(image).cpu(),
                    "degraded": self.extractor(degraded(image)).cpu(),
                }

        return make


def degraded(image: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) at a quarter of its side and back: how far a plain loss of detail lies away, for scale."""
    height, width = image.shape[-2:]
    small = F.interpolate(image.float(), (max(1, height // REDUCTION), max(1, width // REDUCTION)), mode="area")
    large = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).byte()
