"""The real images that drawn ones are held against: the split's own, and the training split with nearest neighbours.

N images of the split, M of the training split, Q queries, F feature width, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train import rng
from fluxflow_train.data.sources import Split
from fluxflow_train.errors import UserError
from fluxflow_train.metrics.features import EfficientNetLite0
from fluxflow_train.reports.passes import TRAIN_POOL, EvaluationData

MAX_IMAGES = 400
MAX_TRAIN = 4096
NUM_NEIGHBOURS = 3
PIXEL_SIDE = 32

Describe = Callable[[Tensor], Tensor]
"""uint8 (B, 3, H, W) to what distances are taken between: float32 (B, F) on the CPU."""


@dataclass
class SplitImages:
    """The first images of a split that can be asked for by caption: `images` uint8 (N, 3, H, W)."""

    indices: list[int]
    keys: list[str]
    captions: list[str]
    images: Tensor
    num_captionless: int


@dataclass
class Neighbour:
    """A training image, uint8 (3, H, W), and how far from the query it is."""

    distance: float
    key: str
    image: Tensor


@dataclass
class TrainImages:
    """`features` (M, F) in an order drawn by the seed; `nearest` the three nearest of each query, nearest first."""

    features: Tensor
    nearest: list[list[Neighbour]]


def read_split_images(data: EvaluationData, split: Split, captionless: bool) -> SplitImages:
    """At most 400, in the order of the split; those without a caption only where `captionless`.

    Raises:
        UserError: there is nothing to ask for.
    """
    found = SplitImages([], [], [], torch.empty(0), 0)
    images: list[Tensor] = []
    for batch in data.eval_dataloader(split):
        for i, caption in enumerate(batch["caption"]):
            if not caption.strip() and not captionless:
                found.num_captionless += 1
            elif len(images) < MAX_IMAGES:
                found.indices.append(int(batch["index"][i]))
                found.keys.append(batch["key"][i])
                found.captions.append(caption)
                images.append(batch["image"][i])
        if len(images) == MAX_IMAGES:
            break
    if not images:
        raise UserError(
            f"the split {split} has no captions, and a model trained with cfg_dropout_prob=0 draws nothing without: "
            "evaluate another split"
        )
    found.images = torch.stack(images)
    return found


def by_extractor(extractor: EfficientNetLite0, device: torch.device) -> Describe:
    """Its features."""
    return lambda image: extractor(image.to(device)).cpu()


def by_pixels(image: Tensor) -> Tensor:
    """Pixels at 32 x 32, scaled so that a Euclidean distance is the root mean square difference in grey levels."""
    small = F.interpolate(image.float(), (PIXEL_SIDE, PIXEL_SIDE), mode="area").flatten(1)
    return small / small.shape[1] ** 0.5


def read_train_images(
    data: EvaluationData, seed: int, describe: Describe, queries: Tensor, advance: Callable[[int], None]
) -> TrainImages:
    """A seeded draw without replacement of at most 4,096 training images, beside `queries` (Q, F).

    `advance` hears of every image read.
    """
    pool = min(data.num_samples("train"), TRAIN_POOL)
    place = {int(index): i for i, index in enumerate(rng.generator(seed, "train-draw").permutation(pool))}
    features: dict[int, Tensor] = {}
    nearest: list[list[Neighbour]] = [[] for _ in queries]
    seen = 0
    for batch in data.eval_dataloader("train"):
        places = [place.get(index, pool) for index in batch["index"].tolist()]
        chosen = [i for i, p in enumerate(places) if p < min(MAX_TRAIN, pool)]
        if chosen:
            values = describe(batch["image"][chosen])
            features |= {places[i]: value for i, value in zip(chosen, values, strict=True)}
            keep_nearest(nearest, distances(queries, values), [(batch["key"][i], batch["image"][i]) for i in chosen])
        seen += len(places)
        advance(len(places))
        if seen >= pool:
            break
    return TrainImages(torch.stack([value for _, value in sorted(features.items())]), nearest)


def keep_nearest(nearest: list[list[Neighbour]], far: Tensor, images: list[tuple[str, Tensor]]) -> None:
    """Let the images of one batch, `far` (Q, B) away, take their places among the three nearest of each query."""
    for row, mine in zip(far, nearest, strict=True):
        for i in row.argsort()[:NUM_NEIGHBOURS].tolist():
            key, image = images[i]
            mine.append(Neighbour(float(row[i]), key, image.clone()))
        mine.sort(key=lambda neighbour: neighbour.distance)
        del mine[NUM_NEIGHBOURS:]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (Q, F) and (M, F) to (Q, M); exact where two are equal."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
