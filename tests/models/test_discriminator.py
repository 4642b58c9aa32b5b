import pytest
import torch

from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import ARM_NAMES
from fluxflow_train.models.discriminator import PatchDiscriminator


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_default_is_the_patch_discriminator_of_pix2pix() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator()
    convs = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convs] == [
        (3, 64, 2),
        (64, 128, 2),
        (128, 256, 2),
        (256, 512, 1),
        (512, 1, 1),
    ]


def test_width_stops_at_max_width() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(width=256, num_downscales=4)
    assert max(c.out_channels for c in discriminator.modules() if isinstance(c, torch.nn.Conv2d)) == 512


@pytest.mark.parametrize("activation", ARM_NAMES)
def test_any_arm_and_non_square_images(activation: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, num_downscales=2, activation=activation)
    logits = discriminator(images(2, 3, 32, 21))
    assert logits.shape == (2, 1, 6, 3)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("activation", ARM_NAMES)
def test_logits_start_at_unit_scale(activation: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=32, num_downscales=2, activation=activation)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert 0.3 < discriminator.features(x)[:, :, 4:-4, 4:-4].square().mean().sqrt() < 3


@pytest.mark.parametrize("num_downscales", [1, 2, 3])
def test_smallest_image(num_downscales: int) -> None:
    discriminator = PatchDiscriminator(width=4, num_downscales=num_downscales)
    side = discriminator.min_size
    assert discriminator(images(1, 3, side, side + 1)).shape[2] == 1
    with pytest.raises(ValueError, match=f"at least {side} pixels"):
        discriminator(images(1, 3, side + 1, side - 1))


def test_an_image_does_not_see_its_batch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    x = images(3, 3, 32, 32)
    torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]))


def test_projection_conditioning_adds_an_inner_product() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, num_downscales=2, context_dim=5)
    x, context = images(2, 3, 32, 32), torch.randn(2, 5)
    zero = discriminator(x, torch.zeros(2, 5))
    shift, double = discriminator(x, context) - zero, discriminator(x, 2 * context) - zero
    assert shift.abs().max() > 0
    torch.testing.assert_close(double, 2 * shift, rtol=1e-4, atol=1e-5)
    shift.sum().backward()
    gradient = discriminator.get_parameter("embed.weight").grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_context_must_match_the_constructor() -> None:
    with pytest.raises(ValueError, match="no context, expected context_dim=5"):
        PatchDiscriminator(width=4, context_dim=5)(images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected context_dim=0"):
        PatchDiscriminator(width=4)(images(1, 3, 32, 32), torch.zeros(1, 5))


def test_spectral_norm_bounds_every_layer() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, num_downscales=1, spectral_norm=True, context_dim=4)
    for _ in range(30):
        discriminator(images(1, 3, 16, 16), torch.zeros(1, 4))
    discriminator.eval()
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("num_downscales", "width"), [(0, 64), (3, 0), (3, 600)])
def test_impossible_arguments(num_downscales: int, width: int) -> None:
    with pytest.raises(ValueError, match="expected num_downscales >= 1"):
        PatchDiscriminator(num_downscales=num_downscales, width=width)


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match="leaky_relu"):
        PatchDiscriminator(activation="leakyrelu")
