"""The outside baseline: a diffusion transformer with adaLN-Zero, SwiGLU and normalised queries and keys.

Legend: B batch, D latent channels, h w latent grid, L = h w tokens, C width, S text tokens, E condition width.
Source: Peebles & Xie 2023, "Scalable diffusion models with transformers"; the text enters by cross-attention as in
Chen et al. 2024, "PixArt-alpha"; SwiGLU: Shazeer 2020; query and key norm: Dehghani et al. 2023.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.activations import arm
from fluxflow_train.models.flow import Condition, TokenStem
from fluxflow_train.models.layers import CrossAttention, SelfAttention, unit_variance_
from fluxflow_train.models.text import TextFeatures


class DiTBlock(nn.Module):
    """Shift, scale and gate of both residual branches from the condition; the gates start at zero."""

    def __init__(self, width: int, num_heads: int, text_width: int, mlp_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, num_heads, qk_norm=nn.RMSNorm)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, num_heads, text_width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * mlp_width), arm("swiglu", mlp_width, dim=-1), nn.Linear(mlp_width, width)
        )
        self.modulation = nn.Linear(text_width, 6 * width)
        unit_variance_(self)
        for layer in (self.modulation, self.cross_attention.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, cond: Tensor, text: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, L, C), cond (B, E), text (B, S, E), mask (B, S)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, grid)
        x = x + self.cross_attention(self.cross_norm(x), text, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """The objective's prediction from a noisy latent, the time and a text: `flow(z, t, text)`."""

    def __init__(self, latent_channels: int, width: int, depth: int, num_heads: int, text_width: int, mlp_width: int):
        super().__init__()
        self.latent_channels = latent_channels
        self.stem = TokenStem(latent_channels, width)
        self.condition = Condition(text_width)
        self.text_norm = nn.LayerNorm(text_width)
        unit_variance_(self)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, text_width, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, latent_channels)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """z (B, D, h, w), t (B,) in [0, 1] to (B, D, h, w)."""
        grid = (z.shape[-2], z.shape[-1])
        context = self.text_norm(text.tokens)
        cond = F.silu(self.condition(t, text.pooled))
        x = self.stem(z)
        for block in self.blocks:
            x = block(x, cond, context, text.mask, grid)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
        prediction = self.out(self.norm(x) * (1 + scale) + shift)
        return rearrange(prediction.to(z.dtype), "b (h w) d -> b d h w", h=grid[0])
