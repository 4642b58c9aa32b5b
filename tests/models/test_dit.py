"""The outside baseline: its block written out, and what it shares with the pillar transformer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.models.dit import DiT, DiTBlock
from fluxflow_train.models.text import TextFeatures

Features = Callable[..., TextFeatures]
GRID = (2, 3)
SWIGLU_GAIN = 1.676532470331091


def build(**options: Any) -> DiT:
    torch.manual_seed(0)
    arguments = {"latent_channels": 4, "width": 32, "depth": 2, "num_heads": 2, "text_width": 24, "mlp_width": 40}
    return DiT(**arguments | options)


def latents(h: int = 2, w: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, h, w, generator=generator), torch.rand(2, generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_block_is_the_equations(
    features: Features,
    randomised: Callable[[nn.Module], nn.Module],
    attend: Callable[..., Tensor],
    turned: Callable[..., Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    block: Any = randomised(DiTBlock(16, 2, 24, 20).to(dtype))
    text = features(dtype=dtype)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
    y = block(x, text.pooled, text.tokens, text.mask, GRID)

    def rms(norm: nn.RMSNorm, heads: Tensor) -> Tensor:
        parts = [F.rms_norm(part, (8,), norm.weight, norm.eps) for part in heads.chunk(2, 1)]
        return torch.cat(parts, 1)

    for i, length in enumerate(text.mask.sum(1).tolist()):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(text.pooled[i]).chunk(6)
        expected = x[i]
        q, k, v = block.attention.qkv(F.layer_norm(expected, (16,)) * (1 + scale1) + shift1).chunk(3, 1)
        q, k = (
            turned(rms(norm, part), 2, GRID)
            for norm, part in ((block.attention.q_norm, q), (block.attention.k_norm, k))
        )
        expected = expected + gate1 * block.attention.out(attend(q, k, v, 2))
        k, v = block.cross_attention.kv(text.tokens[i, :length]).chunk(2, 1)
        q = block.cross_attention.q(block.cross_norm(expected))
        expected = expected + block.cross_attention.out(attend(q, k, v, 2))
        gate, value = block.mlp[0](F.layer_norm(expected, (16,)) * (1 + scale2) + shift2).chunk(2, 1)
        expected = expected + gate2 * block.mlp[2](SWIGLU_GAIN * F.silu(gate) * value)
        torch.testing.assert_close(y[i], expected, rtol=tolerance, atol=tolerance)


def test_a_new_block_does_nothing_and_a_new_network_predicts_exactly_zero(features: Features) -> None:
    (z, t), text = latents(), features()
    x = torch.randn(2, 6, 32)
    assert torch.equal(build().blocks[0](x, text.pooled, text.tokens, text.mask, GRID), x)
    assert torch.equal(build()(z, t, text), torch.zeros_like(z))


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 7), (5, 3)])
@torch.no_grad()
def test_any_grid(features: Features, randomised: Callable[[nn.Module], nn.Module], h: int, w: int) -> None:
    z, t = latents(h, w)
    assert randomised(build())(z, t, features()).shape == z.shape


@torch.no_grad()
def test_padding_of_the_text_never_counts(features: Features, randomised: Callable[[nn.Module], nn.Module]) -> None:
    flow, text = randomised(build()), features()
    expected = flow(*latents(), text)
    filled = text._replace(tokens=torch.where(text.mask[..., None], text.tokens, torch.tensor(-500.0)))
    torch.testing.assert_close(flow(*latents(), filled), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(flow(*latents(), text._replace(tokens=text.tokens.flip(2))), expected, atol=1e-3)
    assert not torch.allclose(flow(*latents(), text._replace(pooled=text.pooled + 1)), expected, atol=1e-3)


def test_gradients_reach_every_parameter(features: Features) -> None:
    flow = build()
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.3)
    target = latents()[0].flip(0)
    reached: list[set[str]] = []
    for _ in range(4):
        optimizer.zero_grad()
        (flow(*latents(), features()) - target).square().mean().backward()
        reached.append({name for name, p in flow.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert reached[0] == {"out.weight", "out.bias"}
    assert reached[-1] == {name for name, _ in flow.named_parameters()}


def test_bf16_and_meta(features: Features, randomised: Callable[[nn.Module], nn.Module]) -> None:
    flow, (z, t), text = randomised(build()), latents(), features()
    with torch.no_grad():
        expected = flow(z, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = flow(z, t, text)
    assert 0 < (rounded - expected).square().mean().sqrt() / expected.std() < 0.1
    with torch.device("meta"):
        y = build()(torch.zeros(2, 4, 3, 5), torch.zeros(2), TextFeatures(*(part.to("meta") for part in text)))
    assert y.shape == (2, 4, 3, 5)


def test_impossible_width() -> None:
    with pytest.raises(ValueError, match="multiple of 4 x num_heads"):
        build(num_heads=3)
