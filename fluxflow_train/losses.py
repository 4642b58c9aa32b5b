"""Losses: pure functions on tensors, in fp32 whatever the precision around them; tasks weigh, sum and log.

Shapes: B batch, C channels, H W pixels, D latent channels, h w latent grid.
What enters non-linearly is taken of the whole global batch, over ranks and micro batches, by whoever trains: the
per-channel KL that decides which channels are `charged`, the gradients at the last layer before their norms. All the
rest is a mean over samples, so equal shards make the mean over ranks the mean over the global batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l1_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error over all elements; a scalar."""
    return (at_least_fp32(x_hat) - at_least_fp32(x)).abs().mean()


def l2_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error over all elements; a scalar."""
    return (at_least_fp32(x_hat) - at_least_fp32(x)).square().mean()


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each element, in nats, fp32, same shape.

    Source: Kingma & Welling 2014, appendix B.
    """
    mu, logvar = at_least_fp32(mu), at_least_fp32(logvar)
    # expm1(v) - v, not exp(v) - 1 - v: near the prior the difference is lost in fp32.
    return 0.5 * (mu.square() + logvar.expm1() - logvar)


def kl_per_channel(mu: Tensor, logvar: Tensor) -> Tensor:
    """(B, D, h, w) to (D,): KL in nats per element, averaged over batch and positions."""
    return kl(mu, logvar).mean(dim=(0, 2, 3))


def free_bits(channel_kl: Tensor, nats: float, charged: Tensor) -> Tensor:
    """Mean over channels of `max(kl, nats)`, a scalar: below `nats` per element a channel's KL costs nothing more.

    `charged` (D,) bool says for which channels the KL of the whole global batch is above `nats`; `channel_kl` (D,) may
    be of a part of it, and the mean over the parts is then the whole's, gradients included.
    `nats` = 0 with all channels charged gives the mean over latent elements.
    Source: Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow", eq. 15.
    """
    return torch.where(charged, channel_kl, nats).mean()


def rate_nats(mu: Tensor, logvar: Tensor) -> Tensor:
    """(B, D, h, w) to (B,): the KL of a whole image in nats, the rate at which its PSNR was bought."""
    return kl(mu, logvar).sum(dim=(1, 2, 3))


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean over logits of any shape, halved. Source: Lim & Ye 2017, "Geometric GAN"; Miyato et al. 2018, eq. 16."""
    return 0.5 * ((1 - at_least_fp32(real)).relu().mean() + (1 + at_least_fp32(fake)).relu().mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks", eq. 17."""
    return -at_least_fp32(fake).mean()


def gradients_at(parameter: Tensor, loss_rec: Tensor, loss_gan: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses' gradients at `parameter` (the decoder's last conv weight), in its shape; the graph is kept."""
    rec, gan = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (loss_rec, loss_gan))
    return rec, gan


def clamped_ratio(norm_rec: Tensor, norm_gan: Tensor, low: float = 0.0, high: float = 10.0) -> Tensor:
    """The GAN loss's weight from two gradient norms, within [low, high].

    Source: Esser et al. 2021, "Taming transformers", eq. 7 (delta = 1e-6).
    """
    return (norm_rec / (norm_gan + 1e-6)).clamp(low, high)


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """(B, C, H, W) to (B,): squared norm of the gradient of each image's summed logits, differentiable.

    The whole forward runs in fp32: a second derivative through bf16 is mostly rounding.
    Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?", eq. 9 (without gamma / 2).
    """
    real = at_least_fp32(real).detach().requires_grad_()
    with torch.autocast(real.device.type, enabled=False):
        logits = discriminator(real)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


@torch.no_grad()
def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] to (B,): dB per image. For the training log: not rounded to uint8."""
    error = (at_least_fp32(x_hat).clamp(-1, 1) - at_least_fp32(x)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
