"""The two readings of the data that an evaluation makes: a sample of the training split, and the whole test split.

B batch, N images of the split, H W pixels, D feature width (1280), M training images drawn.
"""

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fluxflow_train import rng
from fluxflow_train.data.sources import Split
from fluxflow_train.losses import rate_nats
from fluxflow_train.metrics.baselines import PCA, white_like
from fluxflow_train.metrics.features import EfficientNetLite0
from fluxflow_train.metrics.reconstruction import ReconstructionScores, exact_convolutions, psnr
from fluxflow_train.pixels import dequantize, quantize

# A larger training split is drawn from its first images only: it is read in order, and reading it all takes hours.
TRAIN_POOL = 16_384
PCA_IMAGES = 4096
PCA_BYTES = 2**30
NUM_WORST = 4


class EvaluationData(Protocol):
    """What an evaluation asks of a data module."""

    def num_samples(self, split: Split) -> int: ...

    def eval_dataloader(self, split: Split) -> Iterable[dict[str, Any]]: ...


@dataclass
class TrainSample:
    """`images` uint8 (M, 3, H, W) for the PCA; `features` (M', D) of the draw's first, None without an extractor."""

    images: Tensor
    features: Tensor | None


@dataclass
class Example:
    """One image to show: uint8 (3, H, W) twice."""

    index: int
    key: str
    caption: str
    psnr: float
    image: Tensor
    reconstruction: Tensor


@dataclass
class SplitPass:
    """Everything measured on the test split, in the order of reading. `scores` by reconstructor."""

    scores: dict[str, ReconstructionScores]
    sampled_psnr: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    worst: list[tuple[float, int, Example]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    num_nonfinite: int = 0
    num_constant: int = 0

    def all_features(self, name: str) -> Tensor:
        """(N, D) of "real", "model" or "pca"."""
        return torch.cat(self.features[name])


def draw_train(
    data: EvaluationData,
    seed: int,
    num_features: int,
    extractor: EfficientNetLite0 | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> TrainSample:
    """A seeded draw without replacement from the training split, read in one pass; `advance` hears of each batch."""
    pool = min(data.num_samples("train"), TRAIN_POOL)
    place = {int(index): i for i, index in enumerate(rng.generator(seed, "train-draw").permutation(pool))}
    images: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    seen = 0
    for batch in data.eval_dataloader("train"):
        image: Tensor = batch["image"]
        limit = min(PCA_IMAGES, PCA_BYTES // (4 * image[0].numel()))
        places = [place.get(index, pool) for index in batch["index"].tolist()]
        images |= {p: image[i] for i, p in enumerate(places) if p < min(limit, pool)}
        chosen = [i for i, p in enumerate(places) if p < min(num_features, pool)]
        if extractor is not None and chosen:
            values = extractor(image[chosen].to(device)).cpu()
            features |= {places[i]: value for i, value in zip(chosen, values, strict=True)}
        seen += len(image)
        advance(len(image))
        if seen >= pool:
            break
    stacked = torch.stack([value for _, value in sorted(features.items())]) if features else None
    return TrainSample(torch.stack([value for _, value in sorted(images.items())]), stacked)


@torch.inference_mode()
def read_split(
    vae: nn.Module,
    data: EvaluationData,
    split: Split,
    seed: int,
    num_examples: int,
    pca: PCA,
    extractor: EfficientNetLite0 | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> SplitPass:
    """Reconstruct the whole split in fp32 by the posterior mean, by a sample, by PCA and by plain white."""
    result = SplitPass({name: ReconstructionScores() for name in ("model", "pca", "white")})
    draw = rng.generator(seed, "report-examples").permutation(data.num_samples(split))
    chosen = set(draw[:num_examples].tolist())
    for batch in data.eval_dataloader(split):
        image: Tensor = batch["image"].to(device)
        model = reconstruct(vae, image, batch["index"], seed, result)
        made = {"model": model, "pca": pca.reconstruct(batch["image"]).to(device), "white": white_like(image)}
        for name, scores in result.scores.items():
            scores.update(image, made[name], batch["index"])
        if extractor is not None:
            for name, source in (("real", image), ("model", model), ("pca", made["pca"])):
                result.features.setdefault(name, []).append(extractor(source).cpu())
        result.indices += batch["index"].tolist()
        result.keys += batch["key"]
        keep_examples(result, batch, model.cpu(), chosen)
        advance(len(image))
    return result


def reconstruct(vae: nn.Module, image: Tensor, index: Tensor, seed: int, result: SplitPass) -> Tensor:
    """uint8 reconstruction (B, 3, H, W) by the posterior mean; the sampled one's PSNR, rates, speed and defects go into
    `result`."""
    with torch.autocast(image.device.type, enabled=False), exact_convolutions():
        x = dequantize(image)
        shape = vae.latent_shape(*x.shape[-2:])  # type: ignore[operator]
        start = seconds(x.device)
        mean = vae(x, torch.zeros(len(x), *shape, device=x.device))
        result.speeds.append(len(x) / (seconds(x.device) - start))
        eps = rng.normal(seed, "eval-eps", [(i,) for i in index.tolist()], shape).to(x.device)
        sampled = vae(x, eps)
    made = quantize(mean.x_hat)
    result.rates += rate_nats(mean.mu, mean.logvar).tolist()
    result.sampled_psnr += psnr(image, quantize(sampled.x_hat)).tolist()
    result.num_nonfinite += int((~mean.x_hat.isfinite()).flatten(1).any(1).sum())
    result.num_constant += int((is_constant(made) & ~is_constant(image)).sum())
    return made


def is_constant(image: Tensor) -> Tensor:
    """bool (B,): one single value in all channels and pixels."""
    flat = image.flatten(1)
    return flat.amax(1) == flat.amin(1)


def seconds(device: torch.device) -> float:
    """The clock, after all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def keep_examples(result: SplitPass, batch: dict[str, Any], reconstruction: Tensor, chosen: set[int]) -> None:
    """Remember the images of `chosen`, and the worst of all so far."""
    values = psnr(batch["image"], reconstruction).tolist()
    for i, index in enumerate(batch["index"].tolist()):
        example = Example(index, batch["key"][i], batch["caption"][i], values[i], batch["image"][i], reconstruction[i])
        if index in chosen:
            result.examples.append(example)
        heapq.heappush(result.worst, (-values[i], index, example))
        if len(result.worst) > NUM_WORST:
            heapq.heappop(result.worst)
