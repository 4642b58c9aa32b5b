"""Features of the real images of a protocol: made once, kept under data.root, checked before anything is drawn.

N images, F feature width, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.extractors import identity
from fluxflow_train.evaluation.filling import Make, discard_damaged, fill, refuse_damaged
from fluxflow_train.evaluation.images import Images
from fluxflow_train.evaluation.protocol import Protocol
from fluxflow_train.evaluation.store import FeatureStore
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.ranks import Ranks

FOLDER = "references"
MAX_TRAIN = 4096  # training images that PCA and neighbours are taken from
REDUCTION = 4  # of the degraded images, a side

View = Callable[[Tensor], Tensor]
"""What is done to real images, uint8 (N, 3, H, W), before features are taken; its name is part of the store's."""


class RealFeatures(NamedTuple):
    """`features` (N, F) of a list's first N images; `sha256` of them; `fingerprint` of the extractor that made them."""

    features: Tensor
    sha256: str
    images: Images
    fingerprint: list[float]


class Real(NamedTuple):
    """`reference` (R, F), the same images `degraded` (R, F), and `train` (M, F): the reference where there is none."""

    reference: RealFeatures
    degraded: Tensor
    train: RealFeatures


class Need(NamedTuple):
    """The first `count` of `images` as `view` shows them."""

    images: Images
    count: int
    view: View


class Reference:
    """The stores of a protocol's splits and views for one extractor, in `root`/references/."""

    def __init__(self, protocol: Protocol, extractor: Extractor, device: torch.device, root: Path) -> None:
        self.protocol, self.extractor, self.device = protocol, extractor, device
        self.folder = root / FOLDER / f"{protocol.hash[:16]}-{extractor.weights_sha256[:16]}"
        self.described = extractor.describe()

    def store(self, images: Images, view: View) -> FeatureStore:
        """Opened and compared. Raises UserError where it holds features of something else."""
        of = {
            "protocol": self.protocol.hash,
            "view": view.__name__,
            "split": images.split,
            "list_sha256": images.list_sha256,
            "data": images.selection.fingerprint,
            "extractor": identity(self.described),
        }
        remedy = f"delete {self.folder}, or run prepare reference={self.protocol.id} again"
        return FeatureStore(self.folder / f"{images.split}-{view.__name__}", len(images), of, remedy)

    def ensure(self, needs: Sequence[Need], ranks: Ranks) -> None:
        """Have features of all that is needed; those that are there are verified first, those that lack are made.

        Raises:
            UserError: a store is damaged, or of something else.
        """

        def verify() -> None:
            for need in needs:
                refuse_damaged(self.store(need.images, need.view), need.count)

        ranks.first(verify)
        self.fill(needs, ranks)

    def prepare(self, needs: Sequence[Need], ranks: Ranks) -> None:
        """As `ensure`, but damaged files are made again."""

        def clean() -> None:
            for need in needs:
                discard_damaged(self.store(need.images, need.view), need.count)

        ranks.first(clean)
        self.fill(needs, ranks)

    def fill(self, needs: Sequence[Need], ranks: Ranks) -> None:
        for images, count, view in needs:
            label = f"{view.__name__} images of {images.split}"
            fill(self.store(images, view), count, ranks, self.maker(images, view), label)

    def read(self, images: Images, count: int, view: View) -> RealFeatures:
        store = self.store(images, view)
        rows, sha256 = store.read(count)
        return RealFeatures(rows["features"], sha256, images, store.manifest()["extractor"]["fingerprint"])

    def maker(self, images: Images, view: View) -> Make:
        def make(chunks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
            for image in images.batches(chunks):
                features = self.extractor(view(image.to(self.device))).cpu()
                if not features.isfinite().all():
                    raise UserError(
                        f"extractor {self.extractor.name} makes NaN or Inf of real images: use other weights"
                    )
                yield {"features": features}

        return make


# ---- views ----


def original(image: Tensor) -> Tensor:
    """As it is."""
    return image


def degraded(image: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) at a quarter of its side and back: how far a plain loss of detail lies away, for scale."""
    height, width = image.shape[-2:]
    small = F.interpolate(image.float(), (max(1, height // REDUCTION), max(1, width // REDUCTION)), mode="area")
    large = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).byte()
