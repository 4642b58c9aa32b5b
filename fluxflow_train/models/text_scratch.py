"""The text backbone that nobody trained before: a small transformer over UTF-8 bytes.

Legend: B batch, S text tokens (bytes and two marks), W backbone width, N heads.
"""

import hashlib

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.activations import arm
from fluxflow_train.models.layers import unit_variance_
from fluxflow_train.models.text import MAX_TOKENS, Backbone

START, END = 256, 257  # after the 256 bytes; what pads is masked and needs no id
VOCABULARY = 258


class ScratchBackbone(Backbone):
    """Byte and position embeddings, then pre-norm transformer blocks with the arm's activation; trained and saved."""

    def __init__(self, width: int, num_layers: int, num_heads: int, hidden: int, activation: str) -> None:
        """`hidden` channels between the two linear layers of a block."""
        super().__init__(width, MAX_TOKENS)
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(MAX_TOKENS, width)
        self.blocks = nn.ModuleList([Block(width, num_heads, hidden, activation) for _ in range(num_layers)])
        unit_variance_(self)
        for table in (self.bytes, self.positions):  # their sum has unit variance
            nn.init.normal_(table.weight, std=0.5**0.5)

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary alone: the weights are in the checkpoint."""
        return hashlib.sha256(f"UTF-8 bytes, {START}, {END}, {MAX_TOKENS}".encode()).hexdigest()

    def token_ids(self, caption: str) -> list[int]:
        return [START, *caption.encode()[: self.max_tokens - 2], END]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.bytes(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return x


class Block(nn.Module):
    """`x + Attn(LN x)`, then `x + FF(LN x)`; no token attends to one that is not valid."""

    def __init__(self, width: int, num_heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {width} with {num_heads} heads")
        function = arm(activation, hidden, dim=-1)
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden * function.expansion),  # type: ignore[operator]
            function,
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, W), mask (B, S)."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b s (three n d) -> three b n s d", three=3, n=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(rearrange(y, "b n s d -> b s (n d)"))
        return x + self.feed_forward(self.norm2(x))
