"""The patch discriminator: strided convolutions that judge overlapping patches, not whole images.

Shapes: B batch, C image channels, H W pixels, E context width; `h w` the grid of patch logits.
Source: Isola et al. 2017, "Image-to-image translation with conditional adversarial networks", section 3.2.2.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm

from fluxflow_train.models.activations import arm

KERNEL = 4


class PatchDiscriminator(nn.Module):
    """`forward(x, context)`: x (B, C, H, W) in [-1, 1], context (B, E) or None, to logits (B, 1, h, w).

    `num_downscales` strided 4x4 convs double the width from `width` to at most `max_width`, one unstrided conv follows,
    then a 4x4 head. `activation` is any arm: each conv emits its expansion. There is no batch norm: R1 and a step that
    is equal on any number of ranks need one image's logits to depend on that image alone.
    `context_dim` > 0 adds projection conditioning: every logit gains the inner product of its patch's mean
    features with the embedded context (Source: Miyato & Koyama 2018, "cGANs with projection discriminator", eq. 3).

    Raises:
        ValueError: an argument is out of range, or (in `forward`) the image is too small or the context missing.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        num_downscales: int = 3,
        max_width: int = 512,
        activation: str = "leaky_relu",
        spectral_norm: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        if num_downscales < 1 or not 1 <= width <= max_width:
            raise ValueError(
                f"got num_downscales={num_downscales}, width={width}, max_width={max_width}, "
                "expected num_downscales >= 1 and 1 <= width <= max_width"
            )
        wrap = with_spectral_norm if spectral_norm else nn.Identity()
        widths = [min(width * 2**level, max_width) for level in range(num_downscales + 1)]
        strides = [2] * num_downscales + [1]
        layers: list[nn.Module] = []
        for channels_in, channels, stride in zip([in_channels, *widths[:-1]], widths, strides, strict=True):
            act = arm(activation, channels)
            conv = initialised(nn.Conv2d(channels_in, channels * act.expansion, KERNEL, stride, padding=1))
            layers += [wrap(conv), act]
        self.features = nn.Sequential(*layers)
        self.head = wrap(initialised(nn.Conv2d(widths[-1], 1, KERNEL, padding=1)))
        self.context_dim = context_dim
        self.embed = wrap(initialised(nn.Linear(context_dim, widths[-1]))) if context_dim else None
        # Smallest side that leaves one logit: undo the head and the unstrided conv (each takes 1), then the halvings.
        self.min_size = 3 * 2**num_downscales

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(f"got image size {tuple(x.shape[-2:])}, expected sides of at least {self.min_size} pixels")
        if (context is None) != (self.embed is None):
            given = "no context" if context is None else f"a context of {tuple(context.shape)}"
            raise ValueError(f"got {given}, expected context_dim={self.context_dim} (0 = none)")
        features = self.features(x)
        logits = self.head(features)
        if self.embed is None:
            return logits
        patches = F.avg_pool2d(features, KERNEL, stride=1, padding=1)  # the window of the head
        projection = torch.einsum("bchw,bc->bhw", patches, self.embed(context)) / math.sqrt(features.shape[1])
        return logits + projection.unsqueeze(1)


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def initialised(layer: Layer) -> Layer:
    """Weights N(0, 1 / fan_in), biases 0: every arm has unit second moment, so the signal's scale passes unchanged."""
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
