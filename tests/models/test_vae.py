import pytest
import torch

from fluxflow_train.models.layers import Activated, SelfAttention, group_norm, rotary_angles, rotate
from fluxflow_train.models.vae import VAE, Decoder, Encoder, reparameterise


def build(heads: str = "bezier", activation: str = "bezier", latent_channels: int = 4) -> VAE:
    torch.manual_seed(0)
    encoder = Encoder(latent_channels, [8, 12], 4, 1, activation, heads, 4)
    decoder = Decoder(
        latent_channels,
        [12, 8],
        up_kernel=4,
        dilated_kernel=3,
        context_channels=5,
        context_width=16,
        context_depth=1,
        context_heads=2,
        spade_hidden=8,
        head_widths=[8],
        activation=activation,
        spade_activation="relu",
        heads=heads,
        norm_groups=4,
        skip_scale=1.0,
    )
    return VAE(encoder, decoder)


@pytest.mark.parametrize("heads", ["bezier", "plain"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (20, 12)])
def test_any_size_that_the_stride_divides(heads: str, height: int, width: int) -> None:
    vae = build(heads)
    x = torch.rand(2, 3, height, width) * 2 - 1
    out = vae(x, torch.zeros(2, *vae.latent_shape(height, width)))
    assert vae.stride == 4
    assert out.x_hat.shape == x.shape
    assert out.mu.shape == out.logvar.shape == (2, 4, height // 4, width // 4)
    assert out.x_hat.abs().max() <= 1 + 1e-5


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 18 x 16"):
        build().latent_shape(18, 16)


@pytest.mark.parametrize("heads", ["bezier", "plain"])
def test_both_heads_start_at_logvar_minus_four(heads: str) -> None:
    out = build(heads)(torch.randn(2, 3, 16, 16), torch.zeros(2, 4, 4, 4))
    torch.testing.assert_close(out.logvar, torch.full_like(out.logvar, -4.0))


def test_only_the_latent_reaches_the_decoder() -> None:
    """Two images that are given the same z come out the same."""
    vae = build()
    z = torch.randn(1, 4, 4, 4)
    mu, logvar = vae.encoder(torch.rand(2, 3, 16, 16))
    eps = (z - mu) * torch.exp(-0.5 * logvar)
    x_hat = vae.decoder(reparameterise(mu, logvar, eps))
    torch.testing.assert_close(x_hat[0], x_hat[1], rtol=1e-4, atol=1e-5)


def test_standardised_latents_decode_to_the_same_image() -> None:
    vae = build().eval()
    vae.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    x, eps = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    z = vae.encode(x, eps)
    torch.testing.assert_close(vae.decode(z), vae(x, eps).x_hat, rtol=1e-4, atol=1e-5)
    mu, logvar = vae.encoder(x)
    expected = (reparameterise(mu, logvar, eps) - vae.latent_mean.view(-1, 1, 1)) / vae.latent_std.view(-1, 1, 1)
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("activation", ["bezier", "relu", "gelu"])
def test_signal_keeps_its_scale_through_the_depth(activation: str) -> None:
    """Unit activations and unit-variance weights: no stage of either half starts below 0.3 or above 3 in RMS."""
    vae = build(activation=activation)
    scales: list[float] = []
    for module in vae.modules():
        if isinstance(module, Activated):
            module.register_forward_hook(lambda m, i, o: scales.append(o.square().mean().sqrt().item()))
    vae(torch.randn(4, 3, 32, 32).clamp(-1, 1), torch.randn(4, 4, 8, 8))
    assert len(scales) > 8
    assert min(scales) > 0.3
    assert max(scales) < 3


def test_unequal_halves_are_refused() -> None:
    vae = build()
    with pytest.raises(ValueError, match="same length"):
        VAE(Encoder(4, [8], 4, 0, "relu", "plain", 4), vae.decoder)
    with pytest.raises(ValueError, match="latent_channels"):
        VAE(Encoder(8, [8, 8], 4, 0, "relu", "plain", 4), vae.decoder)


def test_rotary_attention_sees_relative_positions_only() -> None:
    """The product of two rotated tokens depends on their distance, not on where they are."""
    angles = rotary_angles(4, 5, 16, torch.device("cpu"), torch.float32)
    q, k = torch.randn(2, 16)
    grid = rotate(q.expand(1, 1, 20, 16), angles)[0, 0] @ rotate(k.expand(1, 1, 20, 16), angles)[0, 0].T
    here, there = (0 * 5 + 0, 2 * 5 + 1), (1 * 5 + 3, 3 * 5 + 4)  # both are (2, 1) apart
    torch.testing.assert_close(grid[here], grid[there], rtol=1e-4, atol=1e-4)


def test_attention_width_must_fit_the_rotation() -> None:
    with pytest.raises(ValueError, match="multiple of 4 x num_heads"):
        SelfAttention(12, 2)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (97, 1), (12, 12)])
def test_groups_are_the_largest_divisor(channels: int, groups: int) -> None:
    assert group_norm(channels, 32).num_groups == groups
