from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.interop import keys08
from fluxflow_train.interop.keys08_flow import flow_entries
from fluxflow_train.models.fluxflow08_flow import FluxFlow08Flow, time_index
from fluxflow_train.models.text import TextFeatures

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VAE_DIM, TEXT_WIDTH, DOWNSCALES = 16, 32, 3
CHANNELS = VAE_DIM + 5
UNSEEN = ("attention.query", "attention.key", "pillar_norm")  # parts of the published network without effect


def peer(width: int, num_heads: int, num_layers: int) -> Any:
    """The package's flow processor, every parameter disturbed: zeros and ones hide what is mixed up."""
    v080: Any = pytest.importorskip("fluxflow.models.v080", reason="the peer fluxflow==0.8.1 is not installed")
    torch.manual_seed(width + num_layers)
    sizes = {"d_model": width, "n_head": num_heads, "n_layers": num_layers}
    net = v080.FluxFlowProcessor(vae_dim=VAE_DIM, embedding_size=TEXT_WIDTH, ctx_tokens=DOWNSCALES, **sizes).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def build(width: int, num_heads: int, num_layers: int) -> FluxFlow08Flow:
    return FluxFlow08Flow(CHANNELS, width, num_layers, num_heads, TEXT_WIDTH, DOWNSCALES)


def load(flow: FluxFlow08Flow, weights: dict[str, Tensor]) -> FluxFlow08Flow:
    flow.load_state_dict(keys08.to_ours(flow_entries(flow), weights, flow.state_dict()))
    return flow


def features(pooled: Tensor) -> TextFeatures:
    return TextFeatures(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool), pooled)


def packed_rows(z: Tensor) -> Tensor:
    """The package's form (B, L + 1, D) of (B, D, h, w); the last row tells the grid."""
    last = z.new_zeros(len(z), 1, z.shape[1])
    last[..., 0], last[..., 1] = z.shape[-2] / 1024, z.shape[-1] / 1024
    return torch.cat([z.flatten(2).mT, last], dim=1)


def inputs(h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, times, pooled text."""
    t = torch.tensor([0.0, 0.3, 0.9123, 1.0], dtype=dtype)
    return torch.randn(4, CHANNELS, h, w, dtype=dtype), t, torch.randn(4, TEXT_WIDTH, dtype=dtype)


@pytest.mark.parametrize(("width", "num_heads", "num_layers"), [(64, 4, 1), (64, 2, 3), (128, 8, 2), (256, 4, 1)])
def test_same_numbers_as_the_package(width: int, num_heads: int, num_layers: int) -> None:
    theirs = peer(width, num_heads, num_layers)
    ours = load(build(width, num_heads, num_layers), theirs.state_dict())
    for dtype, tolerance in TOLERANCE.items():
        theirs.to(dtype)
        ours.to(dtype)
        for h, w in ((4, 4), (3, 5), (1, 2)):
            z, t, pooled = inputs(h, w, dtype)
            with torch.no_grad():
                expected, found = theirs(packed_rows(z), pooled, t), packed_rows(ours(z, t, features(pooled)))
            assert (found - expected).abs().max() <= tolerance, (dtype, h, w)
            assert expected.abs().max() > 0.5


def test_same_gradients_as_the_package() -> None:
    """Through the map; what we do not train has no gradient there either."""
    theirs = peer(64, 4, 2).double()
    ours = load(build(64, 4, 2), theirs.state_dict()).double()
    z, t, pooled = inputs(3, 5, torch.float64)
    weight = torch.randn_like(z)
    (packed_rows(weight)[:, :-1] * theirs(packed_rows(z), pooled, t)[:, :-1]).sum().backward()
    (weight * ours(z, t, features(pooled))).sum().backward()

    state = {name: torch.zeros_like(tensor) for name, tensor in ours.state_dict().items()}
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad != any(part in name for part in UNSEEN), name
        if parameter.grad is not None:
            state[name] = parameter.grad
            assert parameter.grad.abs().max() > 1e-9, name
        else:
            assert not parameter.requires_grad, name
    for name, grad in keys08.to_theirs(flow_entries(ours), state).items():
        if not name.endswith("inv_freq"):
            expected = theirs.get_parameter(name).grad
            expected = torch.zeros_like(grad) if expected is None else expected
            torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_of_the_time_table() -> None:
    theirs = peer(16, 2, 1)
    seen: list[Tensor] = []
    theirs.get_submodule("time_embed.0").register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    t = torch.cat([torch.arange(1000) / 999, torch.rand(1000)])
    with torch.no_grad():
        theirs(packed_rows(torch.zeros(len(t), CHANNELS, 1, 1)), torch.zeros(len(t), TEXT_WIDTH), t)
    assert torch.equal(time_index(t), seen[0])
    assert time_index(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_the_map_holds_every_key() -> None:
    theirs = peer(64, 4, 2).state_dict()
    ours = load(build(64, 4, 2), theirs)
    back = keys08.to_theirs(flow_entries(ours), ours.state_dict())
    assert back.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())
    assert {entry.ours for entry in flow_entries(ours)} == set(ours.state_dict())


def test_fresh_weights_have_the_published_scale() -> None:
    """Spread and largest value of every tensor of a new network."""
    v080: Any = pytest.importorskip("fluxflow.models.v080", reason="the peer fluxflow==0.8.1 is not installed")
    torch.manual_seed(0)
    theirs = v080.FluxFlowProcessor(
        d_model=64, vae_dim=VAE_DIM, embedding_size=TEXT_WIDTH, n_head=4, n_layers=1, ctx_tokens=DOWNSCALES
    ).state_dict()
    ours = build(64, 4, 1)
    for name, tensor in keys08.to_theirs(flow_entries(ours), ours.state_dict()).items():
        scale = theirs[name].abs().max()
        if "time_embed.0" in name:  # normal
            scale = scale.clamp(min=5)
        # A layer that is fused here may be drawn with the scale of the whole.
        assert (tensor.abs().max() - theirs[name].abs().max()).abs() <= 0.35 * scale, name


@pytest.mark.parametrize(("width", "millions"), [(128, 7.49), (512, 112.3)])
def test_published_sizes(width: int, millions: float) -> None:
    with torch.device("meta"):
        flow = FluxFlow08Flow(133, width, 10, 8, 1024, 4)
    assert sum(p.numel() for p in flow.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_only_the_pooled_text_is_read() -> None:
    torch.manual_seed(0)
    flow = build(64, 4, 1)
    z, t, pooled = inputs(2, 2, torch.float32)
    nothing = TextFeatures(torch.full((4, 7, TEXT_WIDTH), torch.nan), torch.zeros(4, 7, dtype=torch.bool), pooled)
    with torch.no_grad():
        assert torch.equal(flow(z, t, nothing), flow(z, t, features(pooled)))
        assert not torch.allclose(flow(z, t, features(pooled)), flow(z, t, features(pooled + 1)))


def test_fewer_tokens_than_the_context_is_made_from() -> None:
    flow = build(64, 4, 1)
    z, t, pooled = inputs(1, 2, torch.float32)
    assert flow(z, t, features(pooled)).shape == z.shape


def test_half_precision() -> None:
    theirs = peer(64, 4, 3)
    flow = load(build(64, 4, 3), theirs.state_dict())
    z, t, pooled = inputs(4, 4, torch.float32)
    with torch.no_grad():
        exact = flow(z, t, features(pooled))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = flow(z, t, features(pooled))
    assert (rounded.float() - exact).square().mean() < 1e-3 * exact.square().mean()


def test_width_must_hold_the_heads() -> None:
    with pytest.raises(ValueError, match="multiple of 2 x num_heads, got 60 with 8 heads"):
        build(60, 8, 1)


def test_training_learns() -> None:
    """A few steps from the published start lower the loss: no path is cut off."""
    torch.manual_seed(0)
    flow = build(64, 4, 2)
    z, t, pooled = inputs(3, 3, torch.float32)
    target = torch.randn_like(z)
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(flow(z, t, features(pooled)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
