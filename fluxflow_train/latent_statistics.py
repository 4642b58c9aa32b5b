"""The scale of a trained VAE's latents, measured once: flows and samplers want them standardised."""

import itertools
import math
from typing import Any

import torch

from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.pixels import dequantize

STATISTICS_IMAGES = 10_000  # of the training set


@torch.no_grad()
def measure_latents(vae: Any, images: ImageData, device: torch.device) -> None:
    """Set the per-channel mean and standard deviation of z = mu + sigma * eps over the first training images.

    In float64; the variance of z is that of mu plus the mean of sigma squared.
    """
    total = square = torch.zeros(vae.latent_channels, dtype=torch.float64, device=device)
    count = 0
    vae.eval()
    dtype = next(vae.parameters()).dtype
    batches = itertools.islice(images.eval_dataloader("train"), math.ceil(STATISTICS_IMAGES / images.batch_size))
    for batch in batches:
        mu, logvar = (t.double() for t in vae.encoder(dequantize(batch["image"].to(device)).to(dtype)))
        total = total + mu.sum(dim=(0, 2, 3))
        square = square + (mu.square() + logvar.exp()).sum(dim=(0, 2, 3))
        count += mu[:, 0].numel()
    mean = total / count
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_((square / count - mean.square()).clamp(min=1e-12).sqrt())
