"""Transposed convolution by 2 followed by an activation, as one stride-1 convolution where that is faster.

B batch, I O channels in and out, C = O / planes channels after the activation, H W input pixels, k kernel size.

An output pixel (2p + a, 2q + b) meets every second tap only, so each of the four phases (a, b) is an ordinary
convolution with k/2 x k/2 taps; the four run as one convolution with 4 O outputs on an (H+1) x (W+1) grid, and the
activation before they are interleaved, on whole planes. Same arithmetic, half of the time on a CPU without AMX
(k = 16, 32 -> 160 channels, 32 x 32, batch 8, forward and backward, one core: 0.44 s for 0.99 s).
"""

import functools
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

LARGE_KERNEL = 16  # the published one; with 4 and 8 the plain form is as fast


@functools.cache
def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 tiles; with it the plain form is fast in bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


def to_phases(x: Tensor, weight: Tensor, bias: Tensor, planes: int) -> Tensor:
    """The four phases of conv_transpose2d(x, weight, bias, stride=2, padding=k/2 - 1): (B, planes * 4 * C, H+1, W+1).

    weight (I, planes * C, k, k) with k a multiple of 4. Output channel: (plane, a, b, c).
    """
    size = weight.shape[-1]
    taps = weight.unflatten(3, (size // 2, 2)).unflatten(2, (size // 2, 2)).flip(2, 3, 4, 5)  # odd taps make phase 0
    taps = rearrange(taps, "i (p c) h a w b -> (p a b c) i h w", p=planes)
    bias = rearrange(bias, "(p c) -> p 1 c", p=planes).expand(-1, 4, -1).flatten()
    return F.conv2d(x, taps, bias, padding=size // 4)


def interleave(phases: Tensor) -> Tensor:
    """(B, 4 * C, H+1, W+1), channel (a, b, c), to (B, C, 2H, 2W): phase 1 starts one position later than phase 0."""
    h, w = phases.shape[-2] - 1, phases.shape[-1] - 1
    grid = rearrange(phases, "n (a b c) h w -> a b n h w c", a=2, b=2)
    rows = [torch.stack([grid[a, 0, :, a : a + h, :w], grid[a, 1, :, a : a + h, 1:]], dim=3) for a in (0, 1)]
    return rearrange(torch.stack(rows, dim=2), "n h a w b c -> n c (h a) (w b)")


class ActivatedUpsampling(nn.ConvTranspose2d):
    """conv_transpose (k, stride 2, padding k/2 - 1) to `planes * C` channels, then `activation` to C: (B, C, 2H, 2W).

    The parameters are those of nn.ConvTranspose2d. `activation` acts on each pixel alone and takes planar channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, planes: int, activation: nn.Module):
        if kernel_size % 2:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an even number")
        super().__init__(in_channels, planes * out_channels, kernel_size, stride=2, padding=kernel_size // 2 - 1)
        self.planes, self.activation = planes, activation

    def by_phases(self, x: Tensor) -> bool:
        """Chosen by device, dtype and size of one image (not of the batch, which may change within a run).

        The phases pay for large kernels, once an image has enough positions to make up for reordering the weights.
        """
        positions = x.shape[-2] * x.shape[-1]
        if x.device.type != "cpu" or self.kernel_size[0] != LARGE_KERNEL or positions < 2 * self.in_channels:
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return not (dtype == torch.bfloat16 and has_amx())

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not self.by_phases(x):
            return self.activation(super().forward(x))
        assert self.bias is not None
        return interleave(self.activation(to_phases(x, self.weight, self.bias, self.planes)))
