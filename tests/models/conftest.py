"""What the tests of the flow networks share: captions' features, and attention written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.models.text import TextFeatures

LENGTHS = (5, 2)


@pytest.fixture
def features() -> Callable[..., TextFeatures]:
    """`features(width=24, dtype=...)`: two captions of 5 and 2 tokens, zero where not valid."""

    def build(width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> TextFeatures:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        tokens = torch.randn(2, max(LENGTHS), width, generator=generator, dtype=dtype) * mask[..., None]
        return TextFeatures(tokens, mask, torch.randn(2, width, generator=generator, dtype=dtype))

    return build


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Every parameter random, those that start at zero too."""

    def draw(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        return module

    return draw


@pytest.fixture
def attend() -> Callable[..., Tensor]:
    """`attend(q, k, v, num_heads)`: softmax(q k / sqrt(d)) v of (L, C) queries and (S, C) keys, head by head."""

    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        heads = []
        for a, b, c in zip(q.chunk(num_heads, 1), k.chunk(num_heads, 1), v.chunk(num_heads, 1), strict=True):
            weight = torch.exp(a @ b.T / math.sqrt(a.shape[1]))
            heads.append(weight / weight.sum(1, keepdim=True) @ c)
        return torch.cat(heads, 1)

    return run


@pytest.fixture
def turned() -> Callable[..., Tensor]:
    """`turned(x, num_heads, grid)`: the 2-D rotation of (L, C) queries or keys, number by number."""

    def run(x: Tensor, num_heads: int, grid: tuple[int, int]) -> Tensor:
        x = x.clone()
        size = x.shape[1] // num_heads
        quarter = size // 4
        for token in range(len(x)):
            y_x = divmod(token, grid[1])
            for head in range(num_heads):
                for pair in range(size // 2):
                    angle = y_x[pair // quarter] * 100.0 ** -((pair % quarter) / max(1, quarter - 1))
                    first, second = head * size + pair, head * size + pair + size // 2
                    a, b = x[token, first].item(), x[token, second].item()
                    x[token, first] = a * math.cos(angle) - b * math.sin(angle)
                    x[token, second] = a * math.sin(angle) + b * math.cos(angle)
        return x

    return run
