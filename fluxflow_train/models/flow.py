"""The latent flow transformer: pillar-attention blocks with Bezier curves, or the same with one MLP of another arm.

Legend: B batch, D latent channels, h w latent grid, L = h w tokens, C width, S text tokens, E condition width.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.activations import arm
from fluxflow_train.models.bezier import Layout, bezier
from fluxflow_train.models.layers import CrossAttention, SelfAttention, unit_variance_
from fluxflow_train.models.text import TextFeatures

PILLARS = 4
TIME_FREQUENCIES = 128
OCTAVES = 4  # of the position features
SILU_GAIN = 1.676532470331091  # to unit second moment, as in activations.py
GATE_MOMENTS = (0.293, 0.42)  # E[sigmoid(x)^2]: of the first block's x ~ N(0, 1), and of the wider stream after it


def time_features(t: Tensor) -> Tensor:
    """(B,) in [0, 1] to (B, 256) sines and cosines of 1000 t, periods from 6 to 60,000, in fp32 at least.

    Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    steps = torch.arange(TIME_FREQUENCIES, device=t.device, dtype=t.dtype)
    angles = 1000 * t[:, None] * torch.exp(-math.log(10_000) / TIME_FREQUENCIES * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_features(h: int, w: int, device: torch.device) -> Tensor:
    """(h w, 18): x and y in [-1, 1] with sines and cosines of 4 octaves.

    Rotary positions say how far two tokens are from each other, but not where on the picture they are.
    """
    ys = torch.linspace(-1, 1, h, device=device).repeat_interleave(w)
    xs = torch.linspace(-1, 1, w, device=device).repeat(h)
    place = torch.stack([xs, ys], dim=-1)
    angles = (place[..., None] * math.pi / 2 * 2.0 ** torch.arange(OCTAVES, device=device)).flatten(1)
    return torch.cat([place, angles.sin(), angles.cos()], dim=-1)


class TokenStem(nn.Module):
    """Latent and position features to tokens: (B, D, h, w) to (B, L, C)."""

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.proj = nn.Linear(latent_channels + 2 + 4 * OCTAVES, width)

    def forward(self, z: Tensor) -> Tensor:
        b, _, h, w = z.shape
        place = position_features(h, w, z.device).to(z.dtype).expand(b, -1, -1)
        return self.proj(torch.cat([rearrange(z, "b d h w -> b (h w) d"), place], dim=-1))


class Condition(nn.Module):
    """cond = pooled text + time: (B, E)."""

    def __init__(self, width: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        return pooled + self.time(time_features(t))


class PillarLinear(nn.Module):
    """Four linear layers at once: (4, N, C) to (4, N, C)."""

    def __init__(self, width: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(PILLARS, width, width) * std)
        self.bias = nn.Parameter(torch.zeros(PILLARS, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Mixer(nn.Module):
    """What every block does first: `x + SelfAttn(LN x)`, then `x + CrossAttn(LN x, text)`."""

    def __init__(self, width: int, num_heads: int, text_width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_attention = CrossAttention(width, num_heads, text_width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.self_attention(self.norm1(x), grid)
        return x + self.cross_attention(self.norm2(x), text, mask)


class PillarCurve(nn.Module):
    """B(sigmoid(t); points), feature by feature where the layout is planar. A module, so that hooks can see t."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout: Layout = layout

    def forward(self, t: Tensor, points: Tensor) -> Tensor:
        """t (B, L, C) and points (4, B, L, C) to (B, L, C)."""
        if self.layout == "planar":
            stacked = torch.cat([t[None], points])
            return bezier(stacked, t_activation="sigmoid", p_activation="none", layout="planar", dim=0)[0]
        joined = torch.cat([t, *points], dim=-1)
        return bezier(joined, t_activation="sigmoid", p_activation="none", layout="interleaved", dim=-1)


class PillarBlock(nn.Module):
    """Four gated MLPs, the pillars, produce the control points of a curve through which each feature passes.

    Source: MODEL.md A5; FluxFlow's public description of its pillar-attention blocks.
    """

    def __init__(self, width: int, num_heads: int, text_width: int, layout: Layout, residual: bool, first: bool):
        super().__init__()
        self.curve = PillarCurve(layout)
        self.residual = residual
        self.mixer = Mixer(width, num_heads, text_width)
        self.film = nn.Linear(text_width, 2 * PILLARS * width)
        # The pillars' input is sigmoid(x) times the points before: its second moment is not 1, the output's shall be.
        moments = [GATE_MOMENTS[not first], 1 / SILU_GAIN**2, 1 / SILU_GAIN**2]
        self.pillars = nn.ModuleList(PillarLinear(width, 1 / math.sqrt(width * moment)) for moment in moments)
        self.pillar_norm = nn.LayerNorm(width)
        self.pillar_attention = CrossAttention(width, num_heads, text_width)
        self.point_norm = nn.LayerNorm(width)
        self.point = nn.Linear(width, width)
        unit_variance_(self)
        for layer in (self.film, self.pillar_attention.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, points: Tensor | None, cond: Tensor, text: Tensor, mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, C) and the control points of the block before (4, B, L, C), None in the first; both anew."""
        b, length, width = x.shape
        x = self.mixer(x, text, mask, grid)
        gamma, beta = rearrange(self.film(cond), "b (two k c) -> two k b 1 c", two=2, k=PILLARS)
        r = torch.addcmul(beta, x.sigmoid(), 1 + gamma)
        if points is not None:
            r = r * points
        r = r.reshape(PILLARS, b * length, width)
        hidden = F.silu(self.pillars[0](r))
        r = self.pillars[2](F.silu(self.pillars[1](hidden))).view(PILLARS, b, length, width)
        queries = rearrange(self.pillar_norm(r), "k b l c -> b (k l) c")
        attended = self.pillar_attention(queries, text, mask)
        produced = r + rearrange(attended, "b (k l) c -> k b l c", k=PILLARS)
        t = x + self.point(self.point_norm(x))
        y = self.curve(t.to(produced.dtype), produced)
        return (x + y if self.residual else y), produced


class MLPBlock(nn.Module):
    """The baseline: the same attention, text and FiLM, and one MLP in the arm's activation for the four pillars."""

    def __init__(self, width: int, num_heads: int, text_width: int, activation: str, hidden: int, residual: bool):
        super().__init__()
        function = arm(activation, hidden, dim=-1)
        self.residual = residual
        self.mixer = Mixer(width, num_heads, text_width)
        self.film = nn.Linear(text_width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden * function.expansion),  # type: ignore[operator]
            function,
            nn.Linear(hidden, width),
        )
        unit_variance_(self)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(
        self, x: Tensor, points: Tensor | None, cond: Tensor, text: Tensor, mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        x = self.mixer(x, text, mask, grid)
        gamma, beta = self.film(cond)[:, None].chunk(2, dim=-1)
        y = self.mlp(self.norm(x) * (1 + gamma) + beta)
        return (x + y if self.residual else y), points


class PillarTransformer(nn.Module):
    """The objective's prediction from a noisy latent, the time and a text: `flow(z, t, text)`.

    `activation="bezier"` has pillar blocks; any other arm has the same network with an MLP of width `mlp_width` in
    place of the pillars. Source: MODEL.md A5.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        text_width: int,
        activation: str,
        mlp_width: int,
        pillar_layout: Layout,
        text_tokens: Literal["sequence", "pooled"],
        residual: bool,
    ):
        """
        Args:
            mlp_width: of the other arms; pillars have none.
            text_tokens: what the cross-attentions see: every token, or the pooled vector alone.
            residual: add each block's curve to the stream; False replaces the stream, as FluxFlow 0.8 does.
        """
        super().__init__()
        if text_tokens not in ("sequence", "pooled"):
            raise ValueError(f'text_tokens must be "sequence" or "pooled", got "{text_tokens}"')
        if pillar_layout not in ("planar", "interleaved"):
            raise ValueError(f'pillar_layout must be "planar" or "interleaved", got "{pillar_layout}"')
        self.latent_channels = latent_channels
        self.text_tokens = text_tokens
        self.stem = TokenStem(latent_channels, width)
        self.condition = Condition(text_width)
        self.text_norm = nn.LayerNorm(text_width)
        unit_variance_(self)
        if activation == "bezier":
            blocks = [PillarBlock(width, num_heads, text_width, pillar_layout, residual, i == 0) for i in range(depth)]
        else:
            blocks = [MLPBlock(width, num_heads, text_width, activation, mlp_width, residual) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, latent_channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """z (B, D, h, w), t (B,) in [0, 1] to (B, D, h, w)."""
        grid = (z.shape[-2], z.shape[-1])
        tokens, mask = text.tokens, text.mask
        if self.text_tokens == "pooled":
            tokens, mask = text.pooled[:, None], mask[:, :1] | True
        context = self.text_norm(tokens)
        cond = F.silu(self.condition(t, text.pooled))
        x, points = self.stem(z), None
        for block in self.blocks:
            x, points = block(x, points, cond, context, mask, grid)
        prediction = self.out(self.norm(x))
        return rearrange(prediction.to(z.dtype), "b (h w) d -> b d h w", h=grid[0])
