"""The Bezier VAE: encoder, Gaussian bottleneck, SPADE-conditioned decoder.

Legend: B batch, H W pixels, D latent channels, h w latent grid, L = h*w tokens, C width.
"""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.activations import arm
from fluxflow_train.models.bezier import TrainableBezier
from fluxflow_train.models.bezier_curve import widen
from fluxflow_train.models.layers import (
    SPADE,
    Activated,
    SelfAttentionBlock,
    add_coordinates,
    group_norm,
    unit_variance_,
)

LOGVAR_RANGE = (-30.0, 20.0)
INITIAL_LOGVAR = -4.0


class VAEOutput(NamedTuple):
    """x_hat (B, 3, H, W) in about [-1, 1]; mu, logvar (B, D, h, w)."""

    x_hat: Tensor
    mu: Tensor
    logvar: Tensor


def reparameterise(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma * eps. Source: Kingma & Welling 2014, section 2.4."""
    return mu + torch.exp(0.5 * logvar) * eps


class Encoder(nn.Module):
    """Image and coordinates to the posterior: a [conv3 -> act, strided conv -> act] stage for each of `widths`."""

    def __init__(
        self,
        latent_channels: int,
        widths: list[int],
        down_kernel: int,
        head_depth: int,
        activation: str,
        heads: str,
        norm_groups: int,
    ):
        """
        Args:
            down_kernel: even size of the stride-2 convolutions.
            head_depth: 1x1 convolution + activation pairs before each of mu and logvar.
            heads: "bezier" (TrainableBezier, sane ranges) or "plain" (identity).
        """
        super().__init__()
        if down_kernel % 2:
            raise ValueError(f"down_kernel must be even, got {down_kernel}")
        function = partial(arm, activation)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        down = partial(nn.Conv2d, kernel_size=down_kernel, stride=2, padding=down_kernel // 2 - 1)
        point = partial(nn.Conv2d, kernel_size=1)
        stages, channels = [], 5
        for i, width in enumerate(widths):
            stages += [
                Activated(channels, width, function, conv, None if i == 0 else norm_groups),
                Activated(width, width, function, down, norm_groups),
            ]
            channels = width
        self.stages = nn.Sequential(*stages)

        def head() -> nn.Sequential:
            inner = [Activated(channels, channels, function, point, norm_groups) for _ in range(head_depth)]
            return nn.Sequential(*inner, group_norm(channels, norm_groups), point(channels, latent_channels))

        self.mu, self.logvar = head(), head()
        self.mu_curve = latent_curve(heads, latent_channels, (-4, -4 / 3, 4 / 3, 4))
        self.logvar_curve = latent_curve(heads, latent_channels, (-8, -16 / 3, -8 / 3, 0))
        unit_variance_(self)
        # Both kinds of head start at logvar = -4 whatever the image: sigma 0.135 drowns nothing.
        last = self.logvar[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.constant_(last.bias, 0.0 if heads == "bezier" else INITIAL_LOGVAR)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) in [-1, 1] to fp32 mu, logvar (B, D, h, w)."""
        y = self.stages(add_coordinates(x))
        mu, logvar = self.mu_curve(widen(self.mu(y))), self.logvar_curve(widen(self.logvar(y)))
        return mu, logvar.clamp(*LOGVAR_RANGE)


def latent_curve(heads: str, channels: int, points: tuple[float, float, float, float]) -> nn.Module:
    """The last function of mu or logvar."""
    if heads == "bezier":
        return TrainableBezier(channels, points)
    if heads == "plain":
        return nn.Identity()
    raise ValueError(f'heads must be "bezier" or "plain", got "{heads}"')


class UpBlock(nn.Module):
    """SPADE, transposed conv x2 -> act, dilated conv -> act, plus the scaled nearest-upsampled input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_kernel: int,
        dilated_kernel: int,
        context_channels: int,
        spade_hidden: int,
        activation: str,
        spade_activation: str,
        norm_groups: int,
        skip_scale: float,
    ):
        super().__init__()
        function = partial(arm, activation)
        self.skip_scale = skip_scale
        self.spade = SPADE(in_channels, context_channels, spade_hidden, partial(arm, spade_activation), norm_groups)
        up = partial(nn.ConvTranspose2d, kernel_size=up_kernel, stride=2, padding=up_kernel // 2 - 1)
        dilated = partial(nn.Conv2d, kernel_size=dilated_kernel, dilation=2, padding=dilated_kernel - 1)
        self.up = Activated(in_channels, out_channels, function, up, None)
        self.refine = Activated(out_channels, out_channels, function, dilated, norm_groups)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.refine(self.up(self.spade(x, context)))
        return y + self.skip_scale * F.interpolate(self.skip(x), scale_factor=2.0, mode="nearest")


class Decoder(nn.Module):
    """Latent to image: one UpBlock for each entry of `widths`, each conditioned on a context made from z alone."""

    def __init__(
        self,
        latent_channels: int,
        widths: list[int],
        up_kernel: int,
        dilated_kernel: int,
        context_channels: int,
        context_width: int,
        context_depth: int,
        context_heads: int,
        spade_hidden: int,
        head_widths: list[int],
        activation: str,
        spade_activation: str,
        heads: str,
        norm_groups: int,
        skip_scale: float,
    ):
        """
        Args:
            up_kernel: even size of the stride-2 transposed convolutions; dilated_kernel: odd, dilation 2.
            context_width, context_depth, context_heads: the self-attention over the latent tokens.
            head_widths: channels of the convolutions before RGB.
            heads: "bezier" (TrainableBezier over [-1, 1]) or "plain" (tanh).
        """
        super().__init__()
        if up_kernel % 2 or not dilated_kernel % 2:
            raise ValueError(f"up_kernel must be even and dilated_kernel odd, got {up_kernel} and {dilated_kernel}")
        if heads not in ("bezier", "plain"):
            raise ValueError(f'heads must be "bezier" or "plain", got "{heads}"')
        self.context_in = nn.Linear(latent_channels, context_width)
        self.context_blocks = nn.ModuleList(
            SelfAttentionBlock(context_width, context_heads, partial(arm, activation, dim=-1), 2 * context_width)
            for _ in range(context_depth)
        )
        self.context_out = nn.Sequential(nn.LayerNorm(context_width), nn.Linear(context_width, context_channels))
        self.stem = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            UpBlock(
                in_channels=c,
                out_channels=d,
                up_kernel=up_kernel,
                dilated_kernel=dilated_kernel,
                context_channels=context_channels,
                spade_hidden=spade_hidden,
                activation=activation,
                spade_activation=spade_activation,
                norm_groups=norm_groups,
                skip_scale=skip_scale,
            )
            for c, d in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        head, channels = [], widths[-1]
        for width in head_widths:
            head += [nn.Conv2d(channels, width, 3, padding=1), group_norm(width, norm_groups), nn.SiLU()]
            channels = width
        self.rgb_conv = nn.Conv2d(channels, 3, 1)
        self.head = nn.Sequential(*head)
        self.rgb = TrainableBezier(3, (-1, -1 / 3, 1 / 3, 1)) if heads == "bezier" else nn.Tanh()
        unit_variance_(self)

    def context(self, z: Tensor) -> Tensor:
        """The spatial context that SPADE reads: (B, D, h, w) -> (B, context_channels, h, w)."""
        h, w = z.shape[-2:]
        tokens = self.context_in(rearrange(z, "b d h w -> b (h w) d"))
        for block in self.context_blocks:
            tokens = block(tokens, (h, w))
        return rearrange(self.context_out(tokens), "b (h w) c -> b c h w", h=h)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, D, h, w), as drawn from the posterior, to an fp32 image (B, 3, H, W)."""
        context = self.context(z)
        y = self.stem(z)
        for block in self.blocks:
            y = block(y, context)
        return self.rgb(widen(self.rgb_conv(self.head(y))))


class VAE(nn.Module):
    """Encoder and decoder around a true bottleneck: nothing but z reaches the decoder.

    `latent_mean` and `latent_std` (D,) are measured on the training set at the end of training; until then `encode` and
    `decode` speak of z itself.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_channels = decoder.stem.in_channels
        self.stride = 2 ** len(decoder.blocks)
        if len(encoder.stages) // 2 != len(decoder.blocks):
            raise ValueError(
                "encoder and decoder widths must have the same length, "
                f"got {len(encoder.stages) // 2} and {len(decoder.blocks)}"
            )
        if encoder.mu[-1].out_channels != self.latent_channels:
            raise ValueError("encoder and decoder must have the same latent_channels")
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latent_std", torch.ones(self.latent_channels))

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last convolution weight, where the adaptive GAN weight compares gradients."""
        return self.decoder.rgb_conv.weight

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(D, h, w) of an image.

        Raises:
            ValueError: the size is not a multiple of the stride.
        """
        if height % self.stride or width % self.stride:
            raise ValueError(f"image size must be a multiple of {self.stride}, got {height} x {width}")
        return self.latent_channels, height // self.stride, width // self.stride

    def forward(self, x: Tensor, eps: Tensor) -> VAEOutput:
        """Reconstruct x (B, 3, H, W) in [-1, 1] through z = mu + sigma * eps; eps (B, D, h, w), zeros for the mean."""
        mu, logvar = self.encoder(x)
        return VAEOutput(self.decoder(reparameterise(mu, logvar, eps)), mu, logvar)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the standardised latent of x, each (B, D, h, w)."""
        mu, logvar = self.encoder(x)
        std = self.latent_std.view(-1, 1, 1)
        return (mu - self.latent_mean.view(-1, 1, 1)) / std, logvar - 2 * std.log()

    def encode(self, x: Tensor, eps: Tensor) -> Tensor:
        """Standardised latent (B, D, h, w) of x."""
        return reparameterise(*self.posterior(x), eps)

    def decode(self, z: Tensor) -> Tensor:
        """Image (B, 3, H, W) of a standardised latent."""
        return self.decoder(z * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1))
