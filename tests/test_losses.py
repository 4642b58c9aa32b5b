import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fluxflow_train.losses import (
    clamped_ratio,
    free_bits,
    gradients_at,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl,
    kl_per_channel,
    l1_loss,
    l2_loss,
    psnr,
    r1_penalty,
    rate_nats,
)
from fluxflow_train.models.discriminator import PatchDiscriminator


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_reconstruction_losses_against_torch() -> None:
    x_hat, x = noise(2, 3, 8, 6), noise(2, 3, 8, 6, seed=1)
    torch.testing.assert_close(l1_loss(x_hat, x), nn.functional.l1_loss(x_hat, x))
    torch.testing.assert_close(l2_loss(x_hat, x), nn.functional.mse_loss(x_hat, x))


def test_losses_of_bf16_are_fp32_and_fp64_stays() -> None:
    x = noise(2, 3, 4, 4)
    for loss in (l1_loss, l2_loss):
        assert loss(x.bfloat16(), x).dtype == torch.float32
        assert loss(x.double(), x.double()).dtype == torch.float64
    assert hinge_generator_loss(x.bfloat16()).dtype == torch.float32
    assert rate_nats(x.bfloat16(), x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert l2_loss(x.bfloat16(), x).dtype == torch.float32


def test_kl_and_rate_against_torch_distributions() -> None:
    mu, logvar = noise(3, 4, 5, 2), noise(3, 4, 5, 2, seed=1) - 2
    reference = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(kl(mu, logvar), reference, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rate_nats(mu, logvar), reference.flatten(1).sum(1))
    torch.testing.assert_close(kl_per_channel(mu, logvar), reference.transpose(0, 1).flatten(1).mean(1))
    charged = torch.ones(mu.shape[1], dtype=torch.bool)
    torch.testing.assert_close(free_bits(kl_per_channel(mu, logvar), 0.0, charged), reference.mean())


def test_kl_is_exact_near_the_prior() -> None:
    logvar = torch.full((1,), 1e-4)
    torch.testing.assert_close(kl(torch.zeros(1), logvar).item(), 0.5 * (1e-8 / 2 + 1e-12 / 6), rtol=1e-3, atol=0)


def test_free_bits_stop_the_gradient_of_cheap_channels_only() -> None:
    mu = torch.stack([torch.full((4, 4), 0.1), torch.full((4, 4), 2.0)]).unsqueeze(0).requires_grad_()
    channel_kl = kl_per_channel(mu, torch.zeros(1, 2, 4, 4))
    loss = free_bits(channel_kl, nats=0.5, charged=channel_kl > 0.5)
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 2.0) / 2)
    assert mu.grad is not None and (mu.grad[0, 0] == 0).all() and (mu.grad[0, 1] > 0).all()


def test_free_bits_clamp_the_average_not_each_image() -> None:
    mu = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)  # KL 0 and 2, mean 1
    channel_kl = kl_per_channel(mu, torch.zeros_like(mu))
    assert free_bits(channel_kl, nats=0.5, charged=channel_kl > 0.5).item() == pytest.approx(1.0)


def test_free_bits_of_parts_average_to_the_whole() -> None:
    """Gradients included: whether a channel is charged is decided by the whole batch, here against its parts."""
    mu = torch.tensor([0.0, 2.0, 0.0, 0.5]).view(2, 2, 1, 1).requires_grad_()  # channel KLs 0 and 1.06 (2 and 0.125)
    whole = kl_per_channel(mu, torch.zeros_like(mu))
    charged = whole > 0.5
    (reference,) = torch.autograd.grad(whole.clamp(min=0.5).mean(), mu)
    parts = [free_bits(kl_per_channel(m, torch.zeros_like(m)), 0.5, charged) for m in mu.split(1)]
    (ours,) = torch.autograd.grad(sum(parts[1:], parts[0]) / 2, mu)
    torch.testing.assert_close(ours, reference)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 2 / 2))
    assert hinge_generator_loss(fake).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rec", "gan", "weight"), [(3.0, 1.5, 2.0), (1.0, 0.0, 10.0), (0.01, 1.0, 0.5), (50.0, 1.0, 10.0)]
)
def test_ratio_is_clamped_on_both_sides(rec: float, gan: float, weight: float) -> None:
    ratio = clamped_ratio(torch.tensor(rec), torch.tensor(gan), low=0.5, high=10.0)
    assert ratio.item() == pytest.approx(weight, rel=1e-5)


def test_ratio_passes_nan_on() -> None:
    assert clamped_ratio(torch.tensor(float("nan")), torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("scale", [-1.0, 1.0])
def test_ratio_is_of_gradient_norms_whatever_the_sign_of_the_loss(scale: float) -> None:
    parameter = noise(4, 3).requires_grad_()
    y = parameter @ noise(3, 5, seed=1)
    loss_rec, loss_gan = y.square().mean(), scale * y.mean()
    rec = torch.autograd.grad(loss_rec, parameter, retain_graph=True)[0]
    gan = torch.autograd.grad(loss_gan, parameter, retain_graph=True)[0]
    weight = clamped_ratio(*(gradient.norm() for gradient in gradients_at(parameter, loss_rec, loss_gan)))
    torch.testing.assert_close(weight, rec.norm() / gan.norm(), rtol=1e-4, atol=1e-6)
    assert not weight.requires_grad
    (loss_rec + weight * loss_gan).backward()  # the graph is still there
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, rec + weight * gan)


def test_gradients_at_two_halves_average_to_the_whole() -> None:
    """What ranks need: the mean of the shards' gradients is the global batch's gradient."""
    parameter, x = noise(4, 3).requires_grad_(), noise(6, 4, seed=1)

    def gradients(part: Tensor) -> tuple[Tensor, Tensor]:
        y = part @ parameter
        return gradients_at(parameter, y.square().mean(), -y.mean())

    whole, first, second = gradients(x), gradients(x[:3]), gradients(x[3:])
    for all_, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(all_, (a + b) / 2)


def test_r1_of_a_linear_discriminator_is_its_squared_weight() -> None:
    linear = nn.Conv2d(3, 2, kernel_size=4)  # one patch, two logits: the gradient of their sum is the sum of filters
    penalty = r1_penalty(linear, noise(5, 3, 4, 4))
    summed = linear.weight.detach().sum(0, keepdim=True)
    torch.testing.assert_close(penalty, summed.square().sum().expand(5))
    penalty.mean().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, 2 * summed.expand_as(linear.weight))


@pytest.mark.parametrize("activation", ["leaky_relu", "bezier", "bezier_channel", "gate5"])
def test_r1_against_finite_differences(activation: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4, num_downscales=1, activation=activation).double()
    real = noise(2, 3, 6, 6, dtype=torch.float64)
    penalty = r1_penalty(discriminator, real)
    step = 1e-6
    basis = torch.eye(108, dtype=torch.float64).view(108, 3, 6, 6)
    for image, value in zip(real, penalty, strict=True):
        with torch.no_grad():
            up, down = (discriminator(image + s * basis).sum(dim=(1, 2, 3)) for s in (step, -step))
        torch.testing.assert_close(value, ((up - down) / (2 * step)).square().sum(), rtol=1e-5, atol=1e-9)
    penalty.sum().backward()
    trained = [name for name, p in discriminator.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {"features.0.weight", "features.2.weight", "head.weight"} <= set(trained)


def test_r1_runs_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4, num_downscales=1)
    real = noise(2, 3, 8, 8)
    expected = r1_penalty(discriminator, real)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(r1_penalty(discriminator, real), expected, rtol=0, atol=0)


def test_psnr_by_hand_and_without_infinity() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x_hat = x.clone()
    x_hat[0] = 0.2  # error 0.04 against a range of 2: 20 dB
    value = psnr(x_hat, x)
    assert value[0].item() == pytest.approx(20, abs=1e-4)
    assert value.isfinite().all()
