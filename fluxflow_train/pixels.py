"""Between the 8-bit pixels of files and the [-1, 1] of the networks."""

import torch
from torch import Tensor


def dequantize(image: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to fp32 in [-1, 1], channels_last."""
    return image.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def quantize(x: Tensor) -> Tensor:
    """[-1, 1] (values beyond are clamped) to uint8, rounded half up; 8-bit images return unchanged.

    torchmetrics' own `normalize=True` truncates and wraps: there 1.01 becomes 1, here 255.
    """
    return x.float().add(1).div(2).mul(255).add(0.5).clamp(0, 255).byte()
