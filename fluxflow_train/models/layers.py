"""Layers that the networks share.

Legend: B batch, C channels, H W pixels, h w latent grid, L tokens, D width, N heads.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int, max_groups: int, affine: bool = True) -> nn.GroupNorm:
    """GroupNorm over the largest divisor of `channels` that is at most `max_groups`."""
    groups = max(g for g in range(1, max_groups + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def unit_variance_(module: nn.Module, gain: float = 1.0) -> None:
    """Draw the weights of every linear and convolution layer so that unit-variance inputs give `gain`**2 variance.

    The activations have unit second moment, so the signal keeps its scale through the depth whatever the arm.
    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        fan_in = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):  # each output pixel meets one tap in stride**2
            fan_in = layer.weight[:, 0].numel() / math.prod(layer.stride)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Activated(nn.Sequential):
    """[GroupNorm ->] convolution to `expansion` x C channels -> activation to C channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: Callable[[int], nn.Module],
        conv: Callable[[int, int], nn.Module],
        max_groups: int | None,
    ):
        """`activation(C)` builds the arm, `conv(C_in, C_out)` the convolution; no norm where `max_groups` is None."""
        function = activation(out_channels)
        norm = [] if max_groups is None else [group_norm(in_channels, max_groups)]
        super().__init__(*norm, conv(in_channels, out_channels * function.expansion), function)  # type: ignore[operator]


def add_coordinates(x: Tensor) -> Tensor:
    """Append the (x, y) position of each pixel in [-1, 1]: (B, C, H, W) -> (B, C + 2, H, W)."""
    b, _, h, w = x.shape
    ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w)
    xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w).expand(b, 1, h, w)
    return torch.cat([x, xs, ys], dim=1)


def rotary_angles(h: int, w: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rotation angles of an h x w grid, row-major: (h * w, dim / 2); half of them turn with y, half with x.

    Source: Su et al. 2021, "RoFormer", in its axial 2-D form (Heo et al. 2024).
    """
    freqs = 100.0 ** -torch.linspace(0, 1, dim // 4, device=device, dtype=dtype)  # grids have up to ~100 cells a side
    ys = torch.arange(h, device=device).repeat_interleave(w)
    xs = torch.arange(w, device=device).repeat(h)
    return torch.cat([ys[:, None] * freqs, xs[:, None] * freqs], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of (B, N, L, D) by `angles` (L, D/2), in their precision."""
    a, b = x.to(angles.dtype).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with 2-D rotary positions over (B, L, D) tokens of an h x w grid."""

    def __init__(self, width: int, num_heads: int, qk_norm: Callable[[int], nn.Module] = nn.Identity):
        """`qk_norm(D / N)` builds what queries and keys pass before they are turned."""
        super().__init__()
        if width % (4 * num_heads):
            raise ValueError(f"attention width must be a multiple of 4 x num_heads, got {width} with {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = qk_norm(width // num_heads), qk_norm(width // num_heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        precision = torch.promote_types(q.dtype, torch.float32)
        angles = rotary_angles(*grid, dim=q.shape[-1], device=x.device, dtype=precision)
        q, k = (rotate(norm(x.to(precision)), angles) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(rearrange(y, "b n l d -> b l (n d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of (B, L, D) queries over S context tokens of width E, those where the mask is True."""

    def __init__(self, width: int, num_heads: int, context_width: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"attention width must be a multiple of num_heads, got {width} with {num_heads} heads")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """context (B, S, E), mask (B, S) bool with at least one True each."""
        q = rearrange(self.q(x), "b l (n d) -> b n l d", n=self.num_heads)
        k, v = rearrange(self.kv(context), "b s (two n d) -> two b n s d", two=2, n=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(rearrange(y, "b n l d -> b l (n d)"))


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block: `x + Attn(LN x)`, then `x + FF(LN x)` with the arm's activation in FF."""

    def __init__(self, width: int, num_heads: int, activation: Callable[[int], nn.Module], hidden: int):
        """`activation(C)` must act on the last dimension."""
        super().__init__()
        function = activation(hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden * function.expansion),  # type: ignore[operator]
            function,
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.attention(self.norm1(x), grid)
        return x + self.feed_forward(self.norm2(x))


class SPADE(nn.Module):
    """`GroupNorm(x) + beta(context)`: spatial, additive only.

    The context (B, S, h, w) is interpolated to x's size. Source: Park et al. 2019, with gamma left out as in FluxFlow.
    """

    def __init__(
        self, channels: int, context_channels: int, hidden: int, activation: Callable[[int], nn.Module], max_groups: int
    ):
        super().__init__()
        self.norm = group_norm(channels, max_groups, affine=False)
        self.hidden = Activated(
            context_channels, hidden, activation, lambda i, o: nn.Conv2d(i, o, 3, padding=1), max_groups=None
        )
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = F.interpolate(context, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.norm(x) + self.beta(self.hidden(context))
