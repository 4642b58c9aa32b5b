"""The three ways in which published FIDs bring an image to the extractor's size: part of a protocol's name.

B batch, H W pixels, S side. Each gives 8-bit images, rounded to nearest: on an S x S image every implementation's own
resizer is the identity (scale 1, weights 0 and 1), so whoever measures our images measures what we did. The published
code feeds the fractions on unrounded: rounding moves a pixel by at most 0.5 of 255.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.errors import UserError

RESIZERS = ("tf1", "clean", "tm-aa")


def check_resizer(name: str) -> None:
    """Raises UserError where `name` is none of `RESIZERS`."""
    if name not in RESIZERS:
        raise UserError(f"there is no resizer {name!r}: take one of {', '.join(RESIZERS)}")


def resize(image: Tensor, side: int, resizer: str) -> Tensor:
    """uint8 (B, 3, H, W) to uint8 (B, 3, S, S), on the same device; proportions are not kept (crop before).

    Raises:
        ValueError: other than uint8 (B, 3, H, W).
        UserError: no such resizer.
    """
    check_resizer(resizer)
    if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"expected uint8 (B, 3, H, W), got {image.dtype} {tuple(image.shape)}")
    if image.shape[0] == 0:
        return image.new_empty((0, 3, side, side))
    if resizer == "tf1":
        x = tf1(image.float(), side)
    elif resizer == "clean":
        x = clean(image, side)
    else:
        x = F.interpolate(image.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).byte()


def tf1(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear: float (B, 3, H, W) to float (B, 3, S, S); corners and half pixels are not aligned.

    out[i] = x[floor(u)] + (x[floor(u) + 1] - x[floor(u)]) frac(u) with u = i H / S; the last row and column repeat.
    Source: tensorflow/core/kernels/resize_bilinear_op.cc, legacy scaler; torch-fidelity and pytorch-fid follow it.
    """
    for dim in (3, 2):
        size = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(size / side)
        low = position.long()
        fraction = (position - low).view((-1, 1) if dim == 2 else (-1,))
        below = x.index_select(dim, low)
        x = below + (x.index_select(dim, (low + 1).clamp_max(size - 1)) - below) * fraction
    return x


def clean(image: Tensor, side: int) -> Tensor:
    """PIL's antialiased bicubic by channel, in float: uint8 (B, 3, H, W) to float (B, 3, S, S), beyond [0, 255] too.

    On the CPU, where PIL is: the same bits on any device.
    Source: Parmar et al. 2022, "On aliased resizing and surprising subtleties in GAN evaluation"; clean-fid's "clean".
    """
    channels = image.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, (-1, 3)).to(image.device)
