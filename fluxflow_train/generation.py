"""Prompts to pictures. An image depends on its prompt, seed, number and settings, never on what else is asked for.

Each prompt is encoded alone, noise is drawn for each image, and images run in micro-batches of one fixed size, filled
up, of prompts that are padded to one length. On a CPU that size is 1: PyTorch computes exp and its like by vector
except at the end of a thread's share of a tensor, which rounds differently, so an image would depend on its place.

Legend: N requests, M images in a micro-batch, H W pixels, D latent channels, h w latent grid, S text tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxflow_train import rng
from fluxflow_train.errors import UserError
from fluxflow_train.models.text import TextEncoder, TextFeatures
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import Objective
from fluxflow_train.pixels import quantize
from fluxflow_train.sampling import Guidance, padded, sample

TOKEN_COUNTS = (16, 32, 64, 128, 256, 512)  # lengths that texts are padded to

OnProgress = Callable[[int, int], None]  # network evaluations done, and of how many


class Request(NamedTuple):
    """One image: `index` numbers the images of a prompt; an empty text is no caption at all."""

    prompt: str
    negative_prompt: str
    index: int


@dataclass(frozen=True)
class Settings:
    """What the images of a request share; `micro_batch` holds on an accelerator, a CPU takes them one by one.

    Raises:
        UserError: no picture can be made so.
    """

    solver: str
    steps: int
    guidance: Guidance
    height: int
    width: int
    seed: int
    micro_batch: int

    def __post_init__(self) -> None:
        scale, (low, high), rescale = self.guidance
        if self.steps < 1 or self.micro_batch < 1:
            raise UserError(f"steps={self.steps}, micro_batch={self.micro_batch}: both must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative: give 0 or more")
        if not math.isfinite(scale) or scale < 0:
            raise UserError(f"guidance={scale} must be a number from 0 on: 1 is no guidance, 3 a usual value")
        if not 0 <= low <= high <= 1:
            raise UserError(f"the guidance interval {low}, {high} must be two times 0 <= low <= high <= 1")
        if not 0 <= rescale <= 1:
            raise UserError(f"the guidance rescale {rescale} must be from 0 to 1")


def settings_of(sampler: dict[str, Any], seed: int) -> Settings:
    """The sampler that an exported model recommends, at its own resolution. Raises UserError as `Settings` does."""
    return Settings(
        solver=sampler["solver"],
        steps=sampler["steps"],
        guidance=Guidance(sampler["guidance"], (0.0, 1.0), 0.0),
        height=sampler["resolution"],
        width=sampler["resolution"],
        seed=seed,
        micro_batch=sampler["micro_batch"],
    )


def generate(
    model: TextToImage,
    objective: Objective,
    requests: Sequence[Request],
    settings: Settings,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Images uint8 (N, 3, H, W) on the CPU, in the order of `requests`; noise comes from (seed, index).

    Raises:
        UserError: the size is no multiple of the VAE's stride; there is no such solver.
    """
    shape = latent_shape(model, settings)
    noise = rng.normal(settings.seed, "sample-noise", [(request.index,) for request in requests], shape)
    return render(model, objective, requests, noise, settings, on_progress)


@torch.no_grad()
def render(
    model: TextToImage,
    objective: Objective,
    requests: Sequence[Request],
    noise: Tensor,
    settings: Settings,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """`generate` from given noise (N, D, h, w); the model runs where it lies, in float32."""
    device = next(model.flow.parameters()).device
    size = 1 if device.type == "cpu" else settings.micro_batch
    evaluations = len(objective.scheduler(settings.solver, settings.steps).timesteps)
    images = torch.empty(len(requests), 3, settings.height, settings.width, dtype=torch.uint8)
    done = 0
    with evaluating(model), pinned_precision(device):
        conditions = {text: encode(model.text, text) for request in requests for text in request[:2]}
        batches = micro_batches(requests, conditions, size)

        def advance() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, evaluations * len(batches))

        for chosen, num_tokens in batches:
            filled = chosen + chosen[:1] * (size - len(chosen))
            z = sample(
                model.flow,
                objective,
                stacked([conditions[requests[i].prompt] for i in filled], num_tokens),
                stacked([conditions[requests[i].negative_prompt] for i in filled], num_tokens),
                noise[filled].to(device),
                solver=settings.solver,
                steps=settings.steps,
                guidance=settings.guidance,
                on_step=advance,
            )
            images[chosen] = quantize(model.vae.decode(z)[: len(chosen)]).cpu()  # type: ignore[operator]
    return images


# ---- text ----


def encode(text: TextEncoder, prompt: str) -> TextFeatures:
    """Features (1, S, E) of a prompt alone; of the null condition where nothing is written."""
    return text.encode([prompt]) if prompt.strip() else text.null(1, 1)


def micro_batches(
    requests: Sequence[Request], conditions: dict[str, TextFeatures], size: int
) -> list[tuple[list[int], int]]:
    """Numbers of requests that run together, at most `size`, and the length that their texts are padded to."""
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        longest = max(conditions[text].mask.shape[1] for text in request[:2])
        groups.setdefault(min(count for count in TOKEN_COUNTS if count >= longest), []).append(i)
    return [
        (group[first : first + size], num_tokens)
        for num_tokens, group in sorted(groups.items())
        for first in range(0, len(group), size)
    ]


def stacked(parts: list[TextFeatures], num_tokens: int) -> TextFeatures:
    """M features of one text each, all padded to `num_tokens`."""
    filled = [padded(part, num_tokens) for part in parts]
    return TextFeatures(*(torch.cat(column) for column in zip(*filled, strict=True)))


def notes(text: TextEncoder, prompts: Sequence[str]) -> list[str]:
    """What the user should know of the prompts: those that are as long as can be read."""
    limit = text.backbone.max_tokens
    return [
        f'the prompt "{prompt[:40]}..." ({len(prompt):,} characters) fills all {limit} tokens: the rest is not read'
        for prompt in dict.fromkeys(prompts)
        if prompt.strip() and text.backbone.tokenize([prompt])[1].shape[1] == limit
    ]


def refuse_untrained_null(cfg_dropout_prob: float, guidance: Guidance, prompts: Sequence[str]) -> None:
    """Raises UserError where a model would need the null condition that it never learned."""
    empty = any(not prompt.strip() for prompt in prompts)
    if cfg_dropout_prob == 0 and (guidance.scale != 1 or empty):
        wish = "an empty prompt" if guidance.scale == 1 else f"guidance={guidance.scale:g}"
        raise UserError(
            f"{wish} needs a model that also learned to draw without a caption, and this one was trained with "
            "cfg_dropout_prob=0: use guidance=1 and no empty prompt, or train with cfg_dropout_prob=0.1"
        )


# ---- the model ----


def latent_shape(model: TextToImage, settings: Settings) -> tuple[int, int, int]:
    """(D, h, w). Raises UserError where the size is no positive multiple of the VAE's stride."""
    stride: int = model.vae.stride  # type: ignore[assignment]
    height, width = settings.height, settings.width
    if height < 1 or width < 1 or height % stride or width % stride:
        raise UserError(f"height={height} width={width} can't be drawn: both must be multiples of {stride}")
    return model.vae.latent_shape(height, width)  # type: ignore[operator]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then what was before; in the memory layout of exported weights, whose kernels round alike."""
    training = [module for module in model.modules() if module.training]
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def pinned_precision(device: torch.device) -> Iterator[None]:
    """float32 as written, and the same kernels every time, whatever a training around us chose."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with cudnn, torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
