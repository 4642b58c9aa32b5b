"""The pillar transformer and its arms against MODEL.md A5, written out one sample and one pillar at a time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.models.activations import ARM_NAMES
from fluxflow_train.models.flow import PillarBlock, PillarTransformer, position_features, time_features
from fluxflow_train.models.text import TextFeatures

Features = Callable[..., TextFeatures]
GRID = (2, 3)


def build(**options: Any) -> PillarTransformer:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "latent_channels": 4,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "text_width": 24,
        "activation": "bezier",
        "mlp_width": 40,
        "pillar_layout": "planar",
        "text_tokens": "sequence",
        "residual": True,
    }
    return PillarTransformer(**arguments | options)


def latents(h: int = 2, w: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, h, w, generator=generator), torch.rand(batch, generator=generator)


# ---- the block, written out ----


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias  # type: ignore[union-attr,operator]


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()  # type: ignore[operator]
    return scaled * norm.weight + norm.bias  # type: ignore[operator]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def cubic(t: Tensor, points: list[Tensor]) -> Tensor:
    s = 1 / (1 + torch.exp(-t))
    return sum(math.comb(3, k) * s**k * (1 - s) ** (3 - k) * p for k, p in enumerate(points))  # type: ignore[return-value]


def curve(t: Tensor, points: list[Tensor], layout: str) -> Tensor:
    """(L, C) each; interleaved: output f reads channels 5 f to 5 f + 4 of [t, p_0, ..., p_3]."""
    if layout == "planar":
        return cubic(t, points)
    joined = torch.cat([t, *points], dim=1)
    outputs = [
        cubic(joined[:, 5 * f], [joined[:, 5 * f + 1 + k] for k in range(4)]) for f in range(joined.shape[1] // 5)
    ]
    return torch.stack(outputs, dim=1)


def reference(
    block: PillarBlock,
    x: Tensor,
    before: Tensor | None,
    cond: Tensor,
    text: Tensor,
    attend: Callable[..., Tensor],
    turned: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """One sample: x (L, C), points (4, L, C) or None, cond (E,), text (S, E) without padding."""
    heads = block.mixer.self_attention.num_heads

    def cross(layer: nn.Module, queries: Tensor) -> Tensor:
        k, v = linear(layer.kv, text).chunk(2, 1)  # type: ignore[arg-type]
        return linear(layer.out, attend(linear(layer.q, queries), k, v, heads))  # type: ignore[arg-type]

    q, k, v = linear(block.mixer.self_attention.qkv, layer_norm(block.mixer.norm1, x)).chunk(3, 1)
    mixed = attend(turned(q, heads, GRID), turned(k, heads, GRID), v, heads)
    x = x + linear(block.mixer.self_attention.out, mixed)
    x = x + cross(block.mixer.cross_attention, layer_norm(block.mixer.norm2, x))
    gamma, beta = linear(block.film, cond).view(2, 4, -1)
    points = []
    for pillar in range(4):
        r = 1 / (1 + torch.exp(-x)) * (1 + gamma[pillar]) + beta[pillar]
        if before is not None:
            r = r * before[pillar]
        for number, layer in enumerate(block.pillars):
            r = r @ layer.weight[pillar] + layer.bias[pillar]  # type: ignore[index]
            r = silu(r) if number < 2 else r
        points.append(r + cross(block.pillar_attention, layer_norm(block.pillar_norm, r)))
    y = curve(x + linear(block.point, layer_norm(block.point_norm, x)), points, block.curve.layout)
    return (x + y if block.residual else y), torch.stack(points)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_block_is_the_equations(
    features: Features,
    randomised: Callable[[nn.Module], nn.Module],
    attend: Callable[..., Tensor],
    turned: Callable[..., Tensor],
    dtype: torch.dtype,
    tolerance: float,
    layout: Any,
    residual: bool,
    first: bool,
) -> None:
    block: Any = randomised(PillarBlock(16, 2, 24, layout, residual, first).to(dtype))
    text = features(dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(2, 6, 16, generator=generator, dtype=dtype), text.pooled
    before = None if first else torch.randn(4, 2, 6, 16, generator=generator, dtype=dtype)
    y, points = block(x, before, cond, text.tokens, text.mask, GRID)
    for i, length in enumerate(text.mask.sum(1).tolist()):
        given = before if before is None else before[:, i]
        expected = reference(block, x[i], given, cond[i], text.tokens[i, :length], attend, turned)
        torch.testing.assert_close((y[i], points[:, i]), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_layouts_differ(features: Features, randomised: Callable[[nn.Module], nn.Module]) -> None:
    outputs = [randomised(build(pillar_layout=layout))(*latents(), features()) for layout in ("planar", "interleaved")]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


# ---- features of time and place ----


def test_time_features_by_hand() -> None:
    values = time_features(torch.tensor([0.25], dtype=torch.float64))[0]
    for i in (0, 1, 64, 127):
        angle = 250 * 10_000 ** -(i / 128)
        assert values[i].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert values[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)
    assert time_features(torch.tensor([0.25], dtype=torch.bfloat16)).dtype == torch.float32


def test_position_features_by_hand() -> None:
    places = position_features(3, 5, torch.device("cpu"))
    assert places.shape == (15, 18)
    x, y = 0.5, -1.0  # the fourth of five columns, the first of three rows
    angles = [place * math.pi / 2 * 2**octave for place in (x, y) for octave in range(4)]
    expected = [x, y, *map(math.sin, angles), *map(math.cos, angles)]
    assert places[3].tolist() == pytest.approx(expected, abs=1e-6)


# ---- the whole network ----


@pytest.mark.parametrize("activation", ["bezier", "relu"])
def test_a_new_network_predicts_exactly_zero(features: Features, activation: str) -> None:
    z, t = latents()
    assert torch.equal(build(activation=activation)(z, t, features()), torch.zeros_like(z))


@pytest.mark.parametrize("activation", ["bezier", "relu"])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 7), (5, 3)])
@torch.no_grad()
def test_any_grid(
    features: Features, randomised: Callable[[nn.Module], nn.Module], activation: str, h: int, w: int
) -> None:
    z, t = latents(h, w)
    y = randomised(build(activation=activation))(z, t, features())
    assert y.shape == z.shape
    assert y.isfinite().all()


@pytest.mark.parametrize("activation", ["bezier", "silu"])
@torch.no_grad()
def test_padding_of_the_text_never_counts(
    features: Features, randomised: Callable[[nn.Module], nn.Module], activation: str
) -> None:
    flow, text = randomised(build(activation=activation)), features()
    expected = flow(*latents(), text)
    garbage = 1e3 * torch.randn(2, 4, 24)
    tokens = torch.where(text.mask[..., None], text.tokens, torch.tensor(-500.0))
    padded = TextFeatures(
        torch.cat([tokens, garbage], 1), torch.cat([text.mask, text.mask[:, :4] & False], 1), text.pooled
    )
    torch.testing.assert_close(flow(*latents(), padded), expected, rtol=1e-5, atol=1e-5)
    changed = text.tokens.clone()
    changed[1, 1] = changed[1, 1].flip(0)  # a token that is valid
    assert not torch.allclose(flow(*latents(), text._replace(tokens=changed)), expected, atol=1e-3)


@pytest.mark.parametrize("activation", ["bezier", "relu"])
@torch.no_grad()
def test_pooled_text_is_all_that_pooled_networks_read(
    features: Features, randomised: Callable[[nn.Module], nn.Module], activation: str
) -> None:
    text, other = features(), features(seed=1)
    flow = randomised(build(activation=activation, text_tokens="pooled"))
    expected = flow(*latents(), text)
    assert torch.equal(flow(*latents(), text._replace(tokens=other.tokens)), expected)
    assert torch.equal(flow(*latents(), text._replace(mask=text.mask.flip(1))), expected)
    assert not torch.allclose(flow(*latents(), text._replace(pooled=other.pooled)), expected, atol=1e-3)
    flow = randomised(build(activation=activation))
    assert not torch.allclose(flow(*latents(), text._replace(tokens=other.tokens)), flow(*latents(), text), atol=1e-3)


@torch.no_grad()
def test_time_and_place_matter(features: Features, randomised: Callable[[nn.Module], nn.Module]) -> None:
    flow, (z, t), text = randomised(build()), latents(), features()
    assert not torch.allclose(flow(z, t, text), flow(z, 1 - t, text), atol=1e-3)
    flat = torch.ones_like(z)  # a latent alike everywhere: only its place tells one token from another
    tokens = flow(flat, t, text).flatten(2)
    assert (tokens[..., 1:] - tokens[..., :1]).abs().amin(2).max() > 1e-3


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@torch.no_grad()
def test_scale_over_depth(features: Features, layout: str) -> None:
    """At the start, twelve blocks deep: neither the points, products over blocks, nor the stream vanish or explode."""
    flow = build(depth=12, width=64, num_heads=4, pillar_layout=layout)
    rms: list[float] = []
    for block in flow.blocks:
        block.register_forward_hook(lambda _, __, out: rms.extend(part.square().mean().sqrt().item() for part in out))
    flow(*latents(8, 8), features())
    assert len(rms) == 24
    assert min(rms) > 0.05
    assert max(rms) < 20


@pytest.mark.parametrize("activation", ["bezier", "swiglu"])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_reach_every_parameter(features: Features, activation: str, residual: bool) -> None:
    """The head starts at zero and lets nothing through; then FiLM and the pillars' attention, which start so too."""
    flow = build(activation=activation, residual=residual)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.3)
    target = latents()[0].flip(0)
    reached: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        (flow(*latents(), features()) - target).square().mean().backward()
        reached.append({name for name, p in flow.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    names = {name for name, _ in flow.named_parameters()}
    assert reached[0] == {"out.weight", "out.bias"}
    behind_zero = ("condition.", "pillar_attention", "pillar_norm")
    assert not [name for name in names - reached[1] if not any(part in name for part in behind_zero)]
    assert reached[2] == names


@pytest.mark.parametrize("name", ARM_NAMES)
def test_every_arm(features: Features, randomised: Callable[[nn.Module], nn.Module], name: str) -> None:
    """Runs and learns in fp32, gives the same under bf16 autocast but for rounding, and runs without memory."""
    flow, (z, t), text = randomised(build(activation=name)), latents(), features()
    expected = flow(z, t, text)
    expected.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = flow(z, t, text)
    assert rounded.dtype == torch.float32
    error = (rounded - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1
    with torch.device("meta"):
        flow = build(activation=name)
        y = flow(torch.zeros(2, 4, 3, 5), torch.zeros(2), TextFeatures(*(part.to("meta") for part in text)))
    assert y.is_meta
    assert y.shape == (2, 4, 3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_tokens": "both"}, '"both"'),
        ({"pillar_layout": "mixed"}, '"mixed"'),
        ({"num_heads": 3}, "multiple of 4 x num_heads"),
        ({"activation": "swishglu"}, "did you mean 'swiglu'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
