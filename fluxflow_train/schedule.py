"""Everything that changes during training, as pure functions of the images seen, never of steps.

So a schedule survives another batch size, another number of ranks, and a second optimizer. `budget` is the number of
images the run will see.
"""

import math


def linear_warmup(images_seen: float, warmup_images: float) -> float:
    """Rises from 0 to 1 over `warmup_images`, then stays; with `warmup_images` = 0 it is 1 from the start."""
    return 1.0 if images_seen >= warmup_images else images_seen / warmup_images


def warmup_cosine(images_seen: float, budget: float, warmup_fraction: float, final_fraction: float) -> float:
    """Factor on the learning rate: linear from 0 to 1, then a half cosine down to `final_fraction` at `budget`.

    Both fractions are in [0, 1]; after `budget` the factor stays at `final_fraction`. Ask with the images seen once the
    coming batch is through: at 0 images the factor is 0 and the batch would be wasted.
    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.
    """
    warmup_images = warmup_fraction * budget
    if images_seen < warmup_images:
        return linear_warmup(images_seen, warmup_images)
    if images_seen >= budget:
        return final_fraction
    progress = (images_seen - warmup_images) / (budget - warmup_images)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_halflife(images_seen: float, budget: float, ramp: float = 0.05, longest: float = 0.1) -> float:
    """Half-life of the weight average in images, `min(ramp * images_seen, longest * budget)`.

    The ramp keeps the random start out of a short run's average.
    Source: Karras et al. 2022 (the training loop of edm; in edm2, Karras et al. 2024, the "traditional" average).
    """
    return min(ramp * images_seen, longest * budget)


def ema_decay(num_images: int, halflife: float) -> float:
    """What is kept of the average after a batch of `num_images`: `0.5 ** (num_images / halflife)`, 0 at half-life 0."""
    return 0.5 ** (num_images / halflife) if halflife > 0 else 0.0
