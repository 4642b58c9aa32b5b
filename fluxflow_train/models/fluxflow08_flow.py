"""The flow transformer of FluxFlow 0.8, number for number, for exchanging checkpoints with the `fluxflow` package.

B batch, D latent channels, h w latent grid, L = h*w tokens, d width, E text width, N heads, P = 4 pillars, k pillar.
Source: MODEL.md part B. What the published network computes and then cannot see is not computed here: attention over
the one text token is the same for every query, the context is read at one of its queries, and the coordinates are the
same for every sample. interop/keys08_flow.py maps the names and the fused weights.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.bezier import TrainableBezier, bezier
from fluxflow_train.models.layers import add_coordinates
from fluxflow_train.models.text import TextFeatures

NUM_PILLARS = 4
PILLAR_DEPTH = 3
NUM_TIMES = 1000
ROTARY_BASE = 10_000.0
CURVE_POINTS = (1e-8, 0.25, 0.75, 1.0)
MIXER_HEAD_WIDTH = 128


def unused(module: nn.Module) -> nn.Module:
    """A part of the published network without effect on its output: kept so that a checkpoint comes back whole."""
    return module.requires_grad_(False)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """The published start. Source: Glorot & Bengio 2010, equation 16."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def time_index(t: Tensor) -> Tensor:
    """t in [0, 1] to the row of the time table: floor(999 t)."""
    return (t * (NUM_TIMES - 1)).long()


def rotary_tables(inv_freq: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (L, head width) of position times frequency, each frequency on two neighbouring channels."""
    positions = torch.arange(length, device=inv_freq.device, dtype=inv_freq.dtype)
    angles = (positions[:, None] * inv_freq).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (..., L, head width), pairing channel i with i + half, where the tables pair neighbours: as published."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, d) with 1-D rotary positions."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = xavier_linear(width, 3 * width), xavier_linear(width, width)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        qkv = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        q, k = rotate(qkv[:2], *tables)
        y = F.scaled_dot_product_attention(q, k, qkv[2])
        return self.out(rearrange(y, "b n l d -> b l (n d)"))


class OneTokenAttention(nn.Module):
    """Attention to a single token: its weight is 1 whatever the query, so all that is left is `out(value(token))`."""

    def __init__(self, width: int):
        super().__init__()
        self.value, self.out = xavier_linear(width, width), xavier_linear(width, width)
        self.query, self.key = unused(xavier_linear(width, width)), unused(xavier_linear(width, width))

    def forward(self, token: Tensor) -> Tensor:
        """(B, d) to the (B, d) that every query gets."""
        return self.out(self.value(token))


class Pillars(nn.Module):
    """Four MLPs of three [Linear -> SiLU] each, side by side."""

    def __init__(self, width: int):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(NUM_PILLARS, width, width) for _ in range(PILLAR_DEPTH))
        self.biases = nn.ParameterList(torch.zeros(NUM_PILLARS, width) for _ in range(PILLAR_DEPTH))
        for weight in self.weights:
            for matrix in weight:
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(P, B, L, d) to the same shape, the k-th slice through the k-th MLP."""
        y = x.flatten(1, 2)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            y = F.silu(torch.baddbmm(bias[:, None], y, weight.mT))
        return y.view_as(x)


class PillarBlock(nn.Module):
    """Attention, then a Bezier curve through the values of four pillars; the stream is replaced, not added to."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = RotarySelfAttention(width, num_heads)
        self.text_attention = OneTokenAttention(width)
        self.film = nn.Linear(width, NUM_PILLARS * 2 * width)
        self.pillars = Pillars(width)
        self.pillar_norm = unused(nn.LayerNorm(width))
        self.pillar_text_attention = OneTokenAttention(width)
        self.feed_forward = xavier_linear(width, width)
        for part in self.film.weight.chunk(NUM_PILLARS):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.film.bias)

    def forward(
        self, x: Tensor, previous: Tensor | None, text: Tensor, cond: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, d) and the control points (P, B, L, d) of the `previous` block to those of this one.

        text and cond (B, d): the text token and the condition of FiLM.
        """
        x = x + self.attention(self.norm1(x), tables)
        x = x + self.text_attention(self.norm2(text))[:, None]
        gamma, beta = rearrange(self.film(cond), "b (k two d) -> two k b 1 d", k=NUM_PILLARS, two=2)
        gated = torch.addcmul(beta, torch.sigmoid(x), 1 + gamma)
        points = self.pillars(gated if previous is None else gated * previous)
        points = points + self.pillar_text_attention(text)[:, None]
        t = x + self.feed_forward(self.norm3(x))
        # Interleaved over the concatenation: most outputs see t or one pillar alone. So the weights were trained.
        y = bezier(
            torch.cat([t, *points.unbind()], dim=-1),
            t_activation="sigmoid",
            p_activation="none",
            layout="interleaved",
            dim=-1,
        )
        return y, points


class ContextMixer(nn.Module):
    """Attention of a learned query to a few tokens and to itself; the published one has queries that nobody reads."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = max(1, width // MIXER_HEAD_WIDTH)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = xavier_linear(width, width), xavier_linear(width, 2 * width)
        self.out = xavier_linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, d) to (B, d)."""
        rows = torch.cat([self.cls.expand(len(x), -1, -1), self.norm_in(x)], dim=1)
        k, v = rearrange(self.key_value(rows), "b l (two n d) -> two b n l d", two=2, n=self.num_heads)
        q = rearrange(self.query(self.cls), "1 1 (n d) -> n 1 d", n=self.num_heads).expand(len(x), -1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.norm_out(self.out(rearrange(y, "b n 1 d -> b (n d)")))


class Head(nn.Module):
    """Tokens to the prediction; to the first of them is added what the mean of a convolutional view of all says."""

    def __init__(self, width: int, latent_channels: int):
        super().__init__()
        self.conv1, self.curve1 = nn.Conv2d(width, width, 5, padding=2), TrainableBezier(width, CURVE_POINTS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.context_conv = nn.Conv2d(width, width, 7, padding=3)
        self.coordinate_conv = nn.Conv2d(2, width, 7, padding=3, bias=False)
        self.context_curve = TrainableBezier(width, CURVE_POINTS)
        self.out = nn.Linear(width, latent_channels)
        # Published as one convolution of d + 2 channels: both parts start at its scale.
        nn.init.uniform_(self.coordinate_conv.weight, -1, 1)
        self.coordinate_conv.weight.data.div_((7 * 7 * (width + 2)) ** 0.5)

    def forward(self, x: Tensor, grid: tuple[int, int], num_context_tokens: int) -> Tensor:
        """x (B, L, d) to (B, L, D)."""
        maps = rearrange(x, "b (h w) d -> b d h w", h=grid[0])
        maps = self.conv2(self.curve1(self.conv1(maps)))
        coordinates = add_coordinates(maps.new_empty(1, 0, *grid, dtype=torch.float32)).to(x.dtype)
        context = self.context_curve(self.context_conv(maps) + self.coordinate_conv(coordinates)).mean((2, 3))
        y = self.out(x)
        first = y[:, :num_context_tokens] + self.out(context)[:, None]
        return torch.cat([first, y[:, num_context_tokens:]], dim=1)


class FluxFlow08Flow(nn.Module):
    """The published flow processor over the packed latent [tokens | context]; reads `text.pooled` alone.

    The published one is given, and returns untouched, a last token that tells the grid: here the grid is the shape.
    """

    inv_freq: Tensor

    def __init__(
        self,
        latent_channels: int,
        width: int,
        num_layers: int,
        num_heads: int,
        text_width: int,
        num_context_tokens: int,
    ):
        """
        Args:
            latent_channels: D of the packed latent, the VAE's `latent_channels`.
            num_context_tokens: how many tokens the context is made from; the VAE's `downscales` in published models.
        """
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(f"width must be a multiple of 2 x num_heads, got {width} with {num_heads} heads")
        self.latent_channels, self.width, self.text_width = latent_channels, width, text_width
        self.num_heads, self.num_context_tokens = num_heads, num_context_tokens
        head_width = width // num_heads
        self.register_buffer("inv_freq", ROTARY_BASE ** (-torch.arange(0, head_width, 2) / head_width))
        self.embed = nn.Linear(latent_channels, width)
        self.mixer = ContextMixer(width)
        self.time_embed = nn.Sequential(
            nn.Embedding(NUM_TIMES, width),
            nn.LayerNorm(width),
            TrainableBezier(width, CURVE_POINTS, dim=-1),
            nn.Linear(width, text_width),
        )
        self.text_token, self.film_cond = nn.Linear(text_width, width), nn.Linear(text_width, width)
        self.context_gate, self.context_bias = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(PillarBlock(width, num_heads) for _ in range(num_layers))
        self.head = Head(width, latent_channels)

    def forward(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """z (B, D, h, w), t (B,) in [0, 1], text.pooled (B, E) to the prediction (B, D, h, w)."""
        h, w = z.shape[-2:]
        x = self.embed(rearrange(z, "b d h w -> b (h w) d"))
        ctx = self.mixer(x[:, : self.num_context_tokens])
        cond = text.pooled + self.time_embed(time_index(t))
        token, cond = self.text_token(cond), self.film_cond(cond)
        tables = rotary_tables(self.inv_freq, h * w)
        points = None
        for block in self.blocks:
            x = torch.addcmul(self.context_bias(ctx)[:, None], x, torch.sigmoid(self.context_gate(ctx))[:, None])
            x, points = block(x, points, token, cond, tables)
            ctx = ctx + x.mean(1)
        y = self.head(x, (h, w), self.num_context_tokens)
        return rearrange(y, "b (h w) d -> b d h w", h=h)
