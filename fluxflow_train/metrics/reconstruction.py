"""PSNR and SSIM of reconstructions: per image on uint8, then the mean over images.

B batch, C channels, H W pixels, N images. Every image's value is computed alone (PSNR from an exact integer sum), so
that neither the batch size nor the number of ranks can change a result.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

PEAK = 255
# Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
SSIM = {"gaussian_kernel": True, "sigma": 1.5, "kernel_size": 11, "k1": 0.01, "k2": 0.03, "data_range": float(PEAK)}
METRICS = ("psnr", "psnr_nonwhite", "ssim")


def exact_convolutions() -> AbstractContextManager[None]:
    """fp32 convolutions in fp32: on a GPU, cuDNN takes TF32 (10 bits) unless told otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def nonwhite(image: Tensor) -> Tensor:
    """Mask (B, H, W) of the pixels of uint8 `image` (B, 3, H, W) that are not exactly (255, 255, 255)."""
    return (image != PEAK).any(dim=1)


def _decibel(squared_error: Tensor, count: Tensor) -> Tensor:
    """10 log10(255^2 / MSE): inf where there is no error, nan where there is nothing to compare."""
    return 10 * torch.log10(PEAK**2 * count.double() / squared_error.double())


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """uint8 (B, C, H, W), twice, to float64 (B,) in dB; inf where they are equal."""
    error = (image.long() - reconstruction.long()).square().sum(dim=(1, 2, 3))
    return _decibel(error, torch.full_like(error, image[0].numel()))


def psnr_nonwhite(image: Tensor, reconstruction: Tensor) -> Tensor:
    """As `psnr`, over the pixels where `image` is not white; nan for an image that is all white."""
    mask = nonwhite(image)
    error = (image.long() - reconstruction.long()).square().sum(dim=1).mul(mask).sum(dim=(1, 2))
    count = image.shape[1] * mask.sum(dim=(1, 2))
    return _decibel(error, count).where(count > 0, torch.nan)


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """uint8 (B, C, H, W), twice, to float64 (B,); torchmetrics in fp32 with every setting pinned in `SSIM`.

    Its borders are reflected and count, unlike the valid region of Wang et al.: a part of the protocol's name.

    Raises:
        ValueError: an image smaller than the 11-pixel window.
    """
    if min(image.shape[-2:]) < SSIM["kernel_size"]:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, got {tuple(image.shape[-2:])}")
    with exact_convolutions():
        value = structural_similarity_index_measure(reconstruction.float(), image.float(), reduction="none", **SSIM)
    assert isinstance(value, Tensor)
    return value.reshape(-1).double()


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the finite values, exactly rounded (so in any order the same); nan if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


class ReconstructionScores:
    """Per-image PSNR, PSNR over non-white pixels and SSIM of a split, gathered batch by batch.

    Kept outside every module: nothing of it enters a checkpoint.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {name: {} for name in METRICS}

    def update(self, image: Tensor, reconstruction: Tensor, index: Tensor) -> None:
        """uint8 `image` and `reconstruction` (B, 3, H, W; see `pixels.quantize`), int64 `index` (B,) in the split."""
        for name, function in (("psnr", psnr), ("psnr_nonwhite", psnr_nonwhite), ("ssim", ssim)):
            self.values[name].update(zip(index.tolist(), function(image, reconstruction).tolist(), strict=True))

    def per_image(self, name: str) -> list[float]:
        """Values in the order of the index: inf for an exact copy, nan where undefined. See `finite_mean`."""
        return [value for _, value in sorted(self.values[name].items())]
