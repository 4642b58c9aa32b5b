"""Frechet distance of stored features as torchmetrics computes it, beside an independent computation.

N real and M fake images, F feature width. Called FID only with the canonical Inception weights' features.
"""

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fluxflow_train.metrics.frechet import PIECE, FrechetDistance, frechet, gaussian, require_enough_images


class StoredFeatures(nn.Module):
    """Stands where torchmetrics expects a network: it gets features and hands them on."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def torchmetrics_frechet(real: Tensor, fake: Tensor) -> float:
    """Value of torchmetrics' FrechetInceptionDistance for features (N, F) and (M, F), in float64, for any N, M > 1.

    torchmetrics takes covariances from sums of squares, which cancel where the mean is large beside the deviation. The
    mean of the real features is subtracted from both sets first; no distance changes by that. Each process computes
    alone: its synchronisation would count the same stored features once per rank.

    Raises:
        ValueError: fewer than two images on a side.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images on each side, got {len(real)} and {len(fake)}")
    shift = real.double().mean(0)
    metric = FrechetInceptionDistance(feature=StoredFeatures(real.shape[1]), sync_on_compute=False).to(real.device)
    for features, is_real in ((real, True), (fake, False)):
        for piece in features.split(PIECE):
            metric.update(piece.double() - shift, real=is_real)
    return float(metric.compute())


def frechet_value(real: Tensor, fake: Tensor) -> FrechetDistance:
    """torchmetrics' value, and how far `frechet`, symmetric where torchmetrics' route is not, lies from it.

    Raises:
        ValueError: fewer than 5 F images on a side.
    """
    require_enough_images(min(len(real), len(fake)), real.shape[1])
    value = torchmetrics_frechet(real, fake)
    return FrechetDistance(value, abs(value - frechet(*gaussian(real), *gaussian(fake)).value))
