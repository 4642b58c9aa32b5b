"""The VAE of FluxFlow 0.8, number for number, for exchanging checkpoints with the `fluxflow` package.

B batch, D latent channels, H W pixels, h w latent grid, L = h*w tokens, S = 5 context channels, C width.
Source: MODEL.md part B. Unlike our own VAE, a deterministic `detail` goes around the bottleneck into the decoder.
The channels of the Bezier inputs are planar here and interleaved in the published files: interop/fluxflow08.py maps.
"""

import math
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.activations import GatedActivation
from fluxflow_train.models.bezier import BezierActivation, PreActivation, TrainableBezier
from fluxflow_train.models.bezier_curve import widen
from fluxflow_train.models.layers import SPADE, add_coordinates, group_norm
from fluxflow_train.models.transposed import ActivatedUpsampling
from fluxflow_train.models.vae import LOGVAR_RANGE, VAEOutput, reparameterise

CONTEXT_CHANNELS = 5
SPADE_HIDDEN = 128
SKIP_SCALE = 0.1


class Code(NamedTuple):
    """What the compressor makes of an image: tokens (B, D, h, w) in (-1, 1), context (B, S, h, w), mu, logvar."""

    tokens: Tensor
    context: Tensor
    mu: Tensor
    logvar: Tensor


def position_encoding(channels: int, h: int, w: int, device: torch.device) -> Tensor:
    """(channels, h, w): the first half over y, the second over x; sine on even channels, cosine on odd ones.

    Source: Vaswani et al. 2017, section 3.5, once per axis.
    """

    def axis(length: int, size: int) -> Tensor:
        rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(10_000.0) / size))
        angles = torch.arange(length, device=device)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size].T

    half = channels // 2
    ys, xs = axis(h, half)[:, :, None], axis(w, channels - half)[:, None, :]
    return torch.cat([ys.expand(-1, -1, w), xs.expand(-1, h, -1)])


def activated(conv: nn.Module, t_activation: PreActivation, dim: int = 1) -> nn.Sequential:
    return nn.Sequential(conv, BezierActivation(t_activation, "silu", "planar", dim))


def relu(channels: int) -> GatedActivation:
    """Plain: the arm of this name would give it unit gain."""
    return GatedActivation(F.relu, expansion=1, gain=1.0, channels=channels, dim=1)


def points_conv(channels: int, t_activation: PreActivation) -> nn.Sequential:
    """Twice [1x1 convolution to 5 D -> Bezier]."""
    return nn.Sequential(*(activated(nn.Conv2d(channels, 5 * channels, 1), t_activation) for _ in range(2)))


class TokenBlock(nn.Module):
    """Pre-norm transformer block over (B, L, D) without positions of its own."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            activated(nn.Linear(width, 5 * 2 * width), "sigmoid", dim=-1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(y, "b n l d -> b l (n d)"))
        return x + self.feed_forward(self.norm2(x))


class Compressor(nn.Module):
    """Image to tokens, context, mu and logvar."""

    def __init__(self, vae_dim: int, downscales: int, in_channels: int, attn_layers: int):
        super().__init__()
        last = max(vae_dim, 8)
        # round() is half-to-even, as the published widths are.
        widths = [round(5 + (last - 5) * i / downscales) for i in range(downscales + 1)]
        stages = []
        for i, (c, d) in enumerate(pairwise(widths)):
            first = nn.Conv2d(in_channels + 2 if i == 0 else c, 5 * d, 3, padding=1, bias=False)
            stages += [activated(first, "tanh"), activated(nn.Conv2d(d, 5 * d, 8, stride=2, padding=3), "tanh")]
        self.stages = nn.Sequential(*stages)
        self.detail = points_conv(vae_dim, "tanh")
        self.mu = nn.Sequential(points_conv(vae_dim, "sigmoid"), TrainableBezier(vae_dim, (-0.5, -0.1, 0.1, 0.5)))
        self.logvar = nn.Sequential(points_conv(vae_dim, "sigmoid"), TrainableBezier(vae_dim, (-1, -0.2, 0.2, 1)))
        self.norm = nn.LayerNorm(vae_dim)
        num_heads = max(n for n in range(1, 9) if vae_dim % n == 0)
        self.context_blocks = nn.Sequential(*(TokenBlock(vae_dim, num_heads) for _ in range(attn_layers)))
        self.context_out = nn.Linear(vae_dim, CONTEXT_CHANNELS)

    def forward(self, x: Tensor, eps: Tensor) -> Code:
        """x (B, 3, H, W) in [-1, 1], eps (B, D, h, w)."""
        # The published coordinates are rounded to float32 whatever the type of the image.
        coordinates = add_coordinates(x.float())[:, -2:].to(x.dtype)
        detail = self.detail(self.stages(torch.cat([x, coordinates], dim=1)))
        mu, logvar = widen(self.mu(detail)), widen(self.logvar(detail))
        _, d, h, w = detail.shape
        code = detail + reparameterise(mu, logvar, eps) + position_encoding(d, h, w, x.device).to(x.dtype)
        tokens = torch.tanh(self.norm(rearrange(code, "b d h w -> b (h w) d")))
        context = self.context_out(self.context_blocks(tokens))
        to_grid = "b (h w) d -> b d h w"
        return Code(rearrange(tokens, to_grid, h=h), rearrange(context, to_grid, h=h), mu, logvar)


class UpBlock(nn.Module):
    """SPADE -> transposed conv x2 -> Bezier -> dilated conv -> Bezier, plus a tenth of the enlarged input."""

    def __init__(self, channels: int):
        super().__init__()
        self.spade = SPADE(channels, CONTEXT_CHANNELS, SPADE_HIDDEN, relu, 32)
        self.up = ActivatedUpsampling(channels, channels, 16, 5, BezierActivation("tanh", "silu"))
        self.refine = activated(nn.Conv2d(channels, 5 * channels, 5, padding=4, dilation=2), "tanh")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.refine(self.up(self.spade(x, context)))
        return y + SKIP_SCALE * F.interpolate(x, scale_factor=2.0, mode="nearest")


class Expander(nn.Module):
    """Tokens and context to an image."""

    def __init__(self, vae_dim: int, upscales: int):
        super().__init__()
        self.blocks = nn.ModuleList(UpBlock(vae_dim) for _ in range(upscales))
        self.head = nn.Sequential(
            nn.Conv2d(vae_dim, 96, 3, padding=1),
            group_norm(96, 8),
            nn.SiLU(),
            nn.Conv2d(96, 48, 3, padding=1),
            group_norm(48, 8),
            nn.SiLU(),
        )
        self.rgb_conv = nn.Conv2d(48, 3, 1)
        self.rgb = TrainableBezier(3, (-0.5, -0.05, 0.05, 0.5))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens (B, D, h, w) and context (B, S, h, w) to (B, 3, H, W)."""
        x = tokens.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, context)
        return widen(self.rgb(self.rgb_conv(self.head(x))))


class FluxFlow08VAE(nn.Module):
    """The published compressor and expander, with the methods and attributes of our own VAE.

    What the decoder reads, and so the latent of a flow, is the grid [tokens | context] of `vae_dim` + S channels. It is
    not standardised further: tokens lie in (-1, 1). `max_hw` is kept for the published description alone: the side, in
    latent cells, of the largest grid that its packed form can tell.
    """

    def __init__(
        self,
        vae_dim: int,
        downscales: int,
        upscales: int,
        in_channels: int = 3,
        attn_layers: int = 4,
        max_hw: int = 1024,
    ):
        super().__init__()
        self.vae_dim, self.downscales, self.upscales = vae_dim, downscales, upscales
        self.in_channels, self.attn_layers, self.max_hw = in_channels, attn_layers, max_hw
        self.stride = 2**downscales
        self.latent_channels = vae_dim + CONTEXT_CHANNELS
        self.compressor = Compressor(vae_dim, downscales, in_channels, attn_layers)
        self.expander = Expander(vae_dim, upscales)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last convolution weight, where the adaptive GAN weight compares gradients."""
        return cast(nn.Parameter, self.expander.rgb_conv.weight)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(`latent_channels`, h, w) of an image.

        Raises:
            ValueError: the size is not a multiple of the stride.
        """
        if height % self.stride or width % self.stride:
            raise ValueError(f"image size must be a multiple of {self.stride}, got {height} x {width}")
        return self.latent_channels, height // self.stride, width // self.stride

    def compress(self, x: Tensor, eps: Tensor) -> Code:
        """x (B, 3, H, W) in [-1, 1]; eps of `latent_shape`, as for every VAE, zeros for the posterior mean.

        The context is made from the tokens and has no noise of its own: the last S channels of eps are not read.
        """
        return self.compressor(x.contiguous(memory_format=torch.channels_last), eps[:, : self.vae_dim])

    def forward(self, x: Tensor, eps: Tensor) -> VAEOutput:
        """Reconstruct x; the arguments of `compress`."""
        code = self.compress(x, eps)
        return VAEOutput(self.expander(code.tokens, code.context), code.mu, code.logvar)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the latent of x, each of `latent_shape`: the grid at eps = 0, taken as certain."""
        code = self.compress(x, x.new_zeros(len(x), *self.latent_shape(*x.shape[-2:])))
        mean = widen(torch.cat([code.tokens, code.context], dim=1))
        return mean, torch.full_like(mean, LOGVAR_RANGE[0])

    def decode(self, z: Tensor) -> Tensor:
        """Image (B, 3, H, W) of a latent (B, `latent_channels`, h, w)."""
        return self.expander(*z.split([self.vae_dim, CONTEXT_CHANNELS], dim=1))
