import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from fluxflow_train.metrics.reconstruction import (
    METRICS,
    ReconstructionScores,
    finite_mean,
    nonwhite,
    psnr,
    psnr_nonwhite,
    ssim,
)


def pair(num: int, size: tuple[int, int] = (24, 16), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, 3, *size), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-20, 21, image.shape, generator=generator)
    return image, (image.long() + noise).clamp(0, 255).byte()


def test_psnr_equals_numpy() -> None:
    image, copy = pair(5)
    a, b = image.numpy().astype(np.float64), copy.numpy().astype(np.float64)
    expected = [10 * np.log10(255**2 / np.mean((p - q) ** 2)) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(image, copy).numpy(), expected, rtol=1e-12)


def test_psnr_does_not_overflow_on_large_images() -> None:
    black, white = torch.zeros(1, 3, 512, 512, dtype=torch.uint8), torch.full((1, 3, 512, 512), 255).byte()
    assert psnr(black, white).item() == pytest.approx(0)


def test_nonwhite_psnr_equals_numpy_on_the_mask() -> None:
    image, copy = pair(4)
    image[:, :, :10] = 255
    image[:, 2, 3, 3] = 254
    a, b = image.numpy().astype(np.float64), copy.numpy().astype(np.float64)
    expected = []
    for p, q in zip(a, b, strict=True):
        mask = ~(p == 255).all(0)
        expected.append(10 * np.log10(255**2 / np.mean((p - q)[:, mask] ** 2)))
    assert bool(nonwhite(image)[:, 3, 3].all())
    np.testing.assert_allclose(psnr_nonwhite(image, copy).numpy(), expected, rtol=1e-12)


def test_a_white_image_has_no_nonwhite_psnr() -> None:
    image = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert psnr_nonwhite(image, torch.zeros_like(image)).isnan().all()


def test_ssim_equals_torchmetrics_image_by_image() -> None:
    image, copy = pair(3, (32, 20))
    expected = []
    for a, b in zip(image, copy, strict=True):
        metric = StructuralSimilarityIndexMeasure(data_range=1.0, sigma=1.5, kernel_size=11)
        expected.append(metric(b[None].double() / 255, a[None].double() / 255).item())
    assert ssim(image, copy).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_a_single_image_and_of_copies() -> None:
    image, _ = pair(1)
    assert ssim(image, image).tolist() == pytest.approx([1.0])


def test_ssim_refuses_images_below_its_window() -> None:
    image, copy = pair(2, (8, 16))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(image, copy)


def test_scores_depend_neither_on_batch_size_nor_on_order() -> None:
    image, copy = pair(13)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    whole, pieces = ReconstructionScores(), ReconstructionScores()
    whole.update(image, copy, torch.arange(13))
    for part in order.split(4):
        pieces.update(image[part], copy[part], part)
    for name in METRICS:
        assert pieces.per_image(name) == whole.per_image(name)


def test_exact_copies_do_not_make_the_mean_infinite() -> None:
    image, copy = pair(3)
    copy[0] = image[0]
    scores = ReconstructionScores()
    scores.update(image, copy, torch.arange(3))
    values = scores.per_image("psnr")
    assert values[0] == math.inf
    assert finite_mean(values) == pytest.approx((values[1] + values[2]) / 2)


def test_the_mean_is_the_same_in_any_order_and_nan_of_nothing() -> None:
    values = [0.1 * i**3 for i in range(50)]
    assert finite_mean(values) == finite_mean(values[::-1])
    assert math.isnan(finite_mean([]))
