"""What a report has its model draw: one picture for each caption, the same prompts over guidance and over noise.

N captions, P prompts, K noises or guidance scales, H W pixels, D latent channels, h w latent grid.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fluxflow_train import rng
from fluxflow_train.generation import Request, Settings, generate, latent_shape, pinned_precision, settings_of
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import Objective
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.reports.passes import seconds
from fluxflow_train.reports.progress import progress

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
SCALE_PROMPTS = 8
NOISE_PROMPTS = 6
NUM_NOISES = 4
PIECE = 16  # images at once through the VAE


@dataclass
class Drawn:
    """Everything drawn: uint8 (N, 3, H, W) `images` by caption; `by_scale` and `by_noise` (P, K, 3, H, W).

    `swept` has images like `images` by guidance scale.

    `again` (3, H, W) is the first picture, asked for once more and alone. `seconds` were spent on `images` alone;
    `num_nonfinite` counts the outputs of the flow and of the decoder, image by image, that held NaN or Inf.
    """

    images: Tensor
    again: Tensor
    prompts: list[str]
    scales: list[float]
    by_scale: Tensor
    by_noise: Tensor
    swept: dict[float, Tensor]
    seconds: float
    num_nonfinite: int


class Artist:
    """A model with the settings it is reported with; counts outputs that are not finite."""

    def __init__(self, model: TextToImage, objective: Objective, settings: Settings, device: torch.device):
        self.model, self.objective, self.settings, self.device = model, objective, settings, device
        self.nonfinite: list[Tensor] = []

    def draw(self, requests: list[Request], advance: Callable[[int], None], scale: float | None = None) -> Tensor:
        """uint8 (N, 3, H, W), with the guidance `scale` in place of the settings' own; `advance` hears of images."""
        settings = self.settings
        if scale is not None:
            settings = replace(settings, guidance=settings.guidance._replace(scale=scale))
        told = 0

        def on_progress(done: int, of: int) -> None:
            nonlocal told
            images = done * len(requests) // of
            advance(images - told)
            told = images

        return generate(self.model, self.objective, requests, settings, on_progress)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, NaN and Inf are noticed: in a uint8 picture they no longer show."""

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.nonfinite.append((~output.isfinite()).flatten(1).any(1).sum())

        handles = [part.register_forward_hook(look) for part in (self.model.flow, *self.model.vae.children())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Posterior means (N, D, h, w), on the CPU, of uint8 (N, 3, H, W)."""
        return self._piecewise(images, lambda x: self.model.vae.posterior(dequantize(x))[0])  # type: ignore[operator]

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) through the VAE alone, by the posterior mean: what the flow cannot exceed."""
        return self.decode(self.encode(images))

    def decode_noise(self, count: int) -> Tensor:
        """uint8 (N, 3, H, W) of latents that are plain noise: what a flow that does nothing would draw."""
        shape = latent_shape(self.model, self.settings)
        noise = rng.normal(self.settings.seed, "sample-noise", [(i,) for i in range(count)], shape)
        return self.decode(noise)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """uint8 (N, 3, H, W), on the CPU, of latents (N, D, h, w)."""
        return self._piecewise(z, lambda piece: quantize(self.model.vae.decode(piece)))  # type: ignore[operator]

    def _piecewise(self, given: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with pinned_precision(self.device):
            return torch.cat([function(piece.to(self.device)).cpu() for piece in given.split(PIECE)])


def reported_settings(sampling: dict[str, Any], seed: int) -> Settings:
    """The sampler that the model recommends; without guidance where it never learned to draw without a caption."""
    settings = settings_of(sampling["sampler"], seed)
    if sampling["cfg_dropout_prob"] > 0:
        return settings
    return replace(settings, guidance=settings.guidance._replace(scale=1.0))


def chosen_prompts(captions: list[str], seed: int) -> list[str]:
    """Up to eight different captions, by the seed."""
    different = [caption for caption in dict.fromkeys(captions) if caption.strip()] or [""]
    order = rng.generator(seed, "report-prompts").permutation(len(different))
    return [different[i] for i in order[:SCALE_PROMPTS]]


def draw_all(artist: Artist, captions: list[str], guided: bool, sweep: Sequence[float] = ()) -> Drawn:
    """All that the report shows.

    Args:
        guided: whether the model can be asked for other scales than 1.
        sweep: guidance scales at which all captions are drawn, beside the settings' own.
    """
    own = artist.settings.guidance.scale
    prompts = chosen_prompts(captions, artist.settings.seed)
    scales = list(SCALES) if guided else [1.0]
    varied = prompts[:NOISE_PROMPTS]
    others = [scale for scale in sweep if scale != own]
    total = len(captions) * (1 + len(others)) + 1 + len(prompts) * len(scales) + len(varied) * NUM_NOISES
    requests = [Request(caption, "", i) for i, caption in enumerate(captions)]
    with artist.watched(), progress("draw images", total) as advance:
        start = seconds(artist.device)
        images = artist.draw(requests, advance)
        elapsed = seconds(artist.device) - start
        again = artist.draw([Request(captions[0], "", 0)], advance)[0]
        by_scale = [artist.draw([Request(prompt, "", 0) for prompt in prompts], advance, scale) for scale in scales]
        by_noise = artist.draw([Request(prompt, "", i) for prompt in varied for i in range(NUM_NOISES)], advance)
        drawn = {own: images} | {scale: artist.draw(requests, advance, scale) for scale in others}
    return Drawn(
        images=images,
        again=again,
        prompts=prompts,
        scales=scales,
        by_scale=torch.stack(by_scale, 1),
        by_noise=by_noise.unflatten(0, (len(varied), NUM_NOISES)),
        swept={scale: drawn[scale] for scale in sweep},
        seconds=elapsed,
        num_nonfinite=int(sum(int(count) for count in artist.nonfinite)),
    )
