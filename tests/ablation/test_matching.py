from collections import OrderedDict
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fluxflow_train.ablation.cost import VAEInputs
from fluxflow_train.ablation.matching import match
from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import arm
from fluxflow_train.models.vae import VAE, Decoder, Encoder

EXPANSION = {"relu": 1, "swiglu": 2, "bernstein1": 3, "bernstein2": 4, "bezier": 5}


class Stack(nn.Sequential):
    """Convolutions of one arm with a GroupNorm each; `fixed` channels in and out."""

    def __init__(self, widths: list[int], activation: str, kernel: int, fixed: int) -> None:
        layers, channels = [], fixed
        for width in widths:
            act, out = arm(activation, width), width * EXPANSION[activation]
            layers += [nn.Conv2d(channels, out, kernel, padding="same"), act, nn.GroupNorm(1, width)]
            channels = width
        super().__init__(*layers, nn.Conv2d(channels, fixed, 1))


class Pair(nn.Module):
    def __init__(self, encoder: list[int], decoder: list[int], activation: str, kernel: int) -> None:
        super().__init__()
        self.encoder = Stack(encoder, activation, kernel, fixed=5)
        self.decoder = Stack(decoder, activation, 3, fixed=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def pair_inputs(network: nn.Module) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 5, 6, 4),)


def on_meta(build, **widths: list[int]) -> nn.Module:
    with torch.device("meta"):
        return build(**widths)


def conv_parameters(widths: list[int], expansion: int, kernel: int) -> int:
    """By hand: what Stack has."""
    total, channels = 0, 5
    for width in widths:
        total += (channels * kernel**2 + 1) * width * expansion + 2 * width
        channels = width
    return total + (channels + 1) * 5


lists = st.lists(st.integers(6, 16).map(lambda k: 8 * k), min_size=2, max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(lists, lists, st.sampled_from([1, 3, 5]), st.sampled_from(["relu", "swiglu", "bernstein1", "bernstein2"]))
def test_random_architectures_match_by_parameters(
    encoder: list[int], decoder: list[int], kernel: int, arm_: str
) -> None:
    reference = on_meta(partial(Pair, activation="bezier", kernel=kernel), encoder=encoder, decoder=decoder)
    build = partial(Pair, activation=arm_, kernel=kernel)
    found = match(build, reference, widths={"encoder": encoder, "decoder": decoder}, inputs=pair_inputs)
    total = 0
    for name, shape, k in (("encoder", encoder, kernel), ("decoder", decoder, 3)):
        widths = found.widths[name]
        assert len(widths) == len(shape) and all(w % 4 == 0 and w > 0 for w in widths)
        target, ours = conv_parameters(shape, 5, k), conv_parameters(widths, EXPANSION[arm_], k)
        total += ours
        assert abs(ours / target - 1) < 0.01
        assert found.residuals[name] == pytest.approx(ours / target - 1)
        multipliers = [w / s for w, s in zip(widths, shape, strict=True)]
        assert max(multipliers) < 2 * min(multipliers)  # the shape is kept, as far as multiples of 4 can
    assert total == sum(p.numel() for p in found.network.parameters())
    assert abs(found.residuals["total"]) < 0.01


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.integers(2, 60), st.sampled_from([2, 4, 8]))
def test_one_width_is_found_or_refused_exactly_as_by_trying_all(width: int, granularity: int) -> None:
    decoder = [32, 32]
    reference = on_meta(partial(Pair, activation="bezier", kernel=3), encoder=[width], decoder=decoder)
    target = conv_parameters([width], 5, 3)
    residuals = {w: conv_parameters([w], 1, 3) / target - 1 for w in range(granularity, 3000, granularity)}
    best = min(residuals, key=lambda w: abs(residuals[w]))

    def build(encoder: list[int]) -> nn.Module:
        pair = Pair(encoder, decoder, "relu", 3)
        pair.decoder = Stack(decoder, "bezier", 3, fixed=5)
        return pair

    if abs(residuals[best]) < 0.01:
        found = match(build, reference, widths={"encoder": [8]}, inputs=pair_inputs, granularity=granularity)
        assert abs(residuals[found.widths["encoder"][0]]) < 0.01
    else:
        with pytest.raises(UserError) as error:
            match(build, reference, widths={"encoder": [8]}, inputs=pair_inputs, granularity=granularity)
        assert f"[{best}], {residuals[best]:+.2%}" in str(error.value)
        assert "\n" not in str(error.value)


def test_by_flops_is_not_by_parameters() -> None:
    """Convolutions cost their positions: halving the picture in the encoder changes one and not the other."""

    def build(encoder: list[int], activation: str) -> nn.Module:
        stack = Stack(encoder, activation, 3, fixed=5)
        stack.insert(3, nn.AvgPool2d(2))
        return nn.Sequential(OrderedDict(encoder=stack))

    reference = on_meta(partial(build, activation="bezier"), encoder=[32, 32])
    found = {
        by: match(partial(build, activation="relu"), reference, widths={"encoder": [32, 32]}, inputs=pair_inputs, by=by)
        for by in ("parameters", "flops")
    }
    assert found["parameters"].widths != found["flops"].widths

    def flops(widths: list[int], expansion: int) -> int:  # 6x4 pixels, then 3x2
        first, second = widths
        return 2 * (24 * 5 * 9 * first * expansion + 6 * first * 9 * second * expansion + 6 * second * 5)

    residual = flops(found["flops"].widths["encoder"], 1) / flops([32, 32], 5) - 1
    assert abs(residual) < 0.01
    assert found["flops"].residuals["encoder"] == pytest.approx(residual)


def test_a_count_that_is_not_quadratic() -> None:
    class Cubic(nn.Module):
        def __init__(self, net: list[int]) -> None:
            super().__init__()
            self.net = nn.ParameterList(nn.Parameter(torch.empty(w, w, w)) for w in net)

    reference = on_meta(Cubic, net=[60, 101])
    found = match(Cubic, reference, widths={"net": [16, 16]}, inputs=pair_inputs)
    assert abs(sum(w**3 for w in found.widths["net"]) / (60**3 + 101**3) - 1) < 0.01


def test_component_that_is_not_there() -> None:
    reference = on_meta(partial(Pair, activation="relu", kernel=3), encoder=[8], decoder=[8])
    with pytest.raises(ValueError, match="'encodr'"):
        match(partial(Pair, activation="relu", kernel=3), reference, widths={"encodr": [8]}, inputs=pair_inputs)


def vae(encoder: list[int], decoder: list[int], activation: str) -> VAE:
    return VAE(
        Encoder(8, encoder, down_kernel=4, head_depth=1, activation=activation, heads="bezier", norm_groups=8),
        Decoder(
            latent_channels=8,
            widths=decoder,
            up_kernel=4,
            dilated_kernel=3,
            context_channels=5,
            context_width=32,
            context_depth=1,
            context_heads=4,
            spade_hidden=16,
            head_widths=[32, 16],
            activation=activation,
            spade_activation="relu",
            heads="bezier",
            norm_groups=8,
            skip_scale=0.1,
        ),
    )


@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_relu_vae_matches_the_bezier_vae_with_equal_groups(by) -> None:
    widths = {"encoder": [16, 32, 48], "decoder": [48, 32, 16]}
    reference = on_meta(partial(vae, activation="bezier"), **widths)
    build = partial(vae, activation="relu")
    found = match(build, reference, widths=widths, inputs=VAEInputs(64, 32), by=by, granularity=8)
    assert set(found.residuals) == {"encoder", "decoder", "total"}
    assert all(abs(r) < 0.01 for r in found.residuals.values())
    assert all(w % 8 == 0 and w > s for name in widths for w, s in zip(found.widths[name], widths[name], strict=True))
    groups = {m.num_groups for m in found.network.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {m.num_groups for m in reference.modules() if isinstance(m, nn.GroupNorm)} == {8}


def test_the_same_arm_is_its_own_match() -> None:
    widths = {"encoder": [16, 24, 40], "decoder": [40, 24, 16]}
    build = partial(vae, activation="bezier")
    found = match(build, on_meta(build, **widths), widths=widths, inputs=VAEInputs(64, 64))
    assert found.widths == widths and set(found.residuals.values()) == {0.0}
