"""A finished run as a function from prompts to pictures, in the manner of diffusers; and what `sample` does with it.

Legend: N images, D latent channels, h w latent grid.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fluxflow_train import generation, pictures, weights
from fluxflow_train.errors import UserError
from fluxflow_train.generation import OnProgress, Request, Settings
from fluxflow_train.hardware import device_of
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import Objective
from fluxflow_train.sampling import Guidance

console = Console(stderr=True)


class PipelineOutput(NamedTuple):
    """RGB images; those of one prompt stand together."""

    images: list[Image.Image]


class Pipeline:
    """`Pipeline.from_run(folder)("a red heart").images[0]`."""

    def __init__(self, model: TextToImage, objective: Objective, description: dict[str, Any]):
        """`description` is that of `model.json`; `model` stays on its device."""
        self.model, self.objective, self.description = model, objective, description

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "auto") -> "Pipeline":
        """
        Raises:
            UserError: the folder holds no finished run, or one of another kind; there is no such device.
        """
        folder, place = Path(folder).expanduser(), device_of(device)
        model, description = weights.load_model(folder)
        if not isinstance(model, TextToImage):
            raise UserError(
                f"{folder} is no text-to-image run ({type(model).__name__}): give a run of +experiment=flow_*"
            )
        return cls(model.to(place), weights.build(description["objective"]), description)

    def settings(
        self,
        *,
        seed: int,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
    ) -> Settings:
        """What the run was validated with, where nothing else is asked for.

        Raises:
            UserError: no picture can be made so.
        """
        trained = self.description["sampler"]
        if len(guidance_interval) != 2:
            raise UserError(f"guidance_interval={list(guidance_interval)} must be two times: [0,1] is everywhere")
        low, high = guidance_interval
        scale = trained["guidance"] if guidance is None else guidance
        settings = Settings(
            solver=solver or trained["solver"],
            steps=trained["steps"] if steps is None else steps,
            guidance=Guidance(float(scale), (float(low), float(high)), float(guidance_rescale)),
            height=trained["resolution"] if height is None else height,
            width=trained["resolution"] if width is None else width,
            seed=seed,
            micro_batch=trained["micro_batch"],
        )
        generation.latent_shape(self.model, settings)  # a wrong size is told before anything is computed
        return settings

    def generate(
        self, requests: Sequence[Request], settings: Settings, on_progress: OnProgress | None = None
    ) -> Tensor:
        """uint8 (N, 3, H, W) on the CPU, with noise from (seed, index).

        Raises:
            UserError: the model cannot do what is asked.
        """
        self.refuse_impossible(requests, settings)
        return generation.generate(self.model, self.objective, requests, settings, on_progress)

    def refuse_impossible(self, requests: Sequence[Request], settings: Settings) -> None:
        """Raises UserError for what this model never learned, or what would have no effect."""
        prompts = [request.prompt for request in requests]
        generation.refuse_untrained_null(self.description["cfg_dropout_prob"], settings.guidance, prompts)
        if settings.guidance.scale == 1 and any(request.negative_prompt for request in requests):
            raise UserError("a negative prompt has no effect with guidance=1: leave it out, or ask for guidance=3")

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        solver: str | None = None,
    ) -> PipelineOutput:
        """
        Args:
            prompt, negative_prompt: a text or one for each image; "" is no caption.
            num_inference_steps, guidance_scale, height, width, solver: those of the run's validation unless given.
            generator: where noise comes from, drawn for all images at once; else it comes from `seed` and the number
                of each prompt's image, as in `sample`.

        Raises:
            UserError: no picture can be made so.
        """
        requests = requests_of(prompt, negative_prompt, num_images_per_prompt)
        settings = self.settings(
            seed=seed,
            solver=solver,
            steps=num_inference_steps,
            guidance=guidance_scale,
            height=height,
            width=width,
        )
        if generator is None:
            images = self.generate(requests, settings)
        else:
            self.refuse_impossible(requests, settings)
            shape = (len(requests), *generation.latent_shape(self.model, settings))
            noise = torch.randn(shape, generator=generator, device=generator.device).cpu()
            images = generation.render(self.model, self.objective, requests, noise, settings)
        return PipelineOutput([pictures.to_pil(image) for image in images])


def requests_of(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, num_images_per_prompt: int
) -> list[Request]:
    """Prompt by prompt, each with images 0, 1, ...

    Raises:
        UserError: nothing to draw, or another number of negative prompts than of prompts.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negative = negative_prompt or ""
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or num_images_per_prompt < 1:
        raise UserError(
            f"{len(prompts)} prompts of {num_images_per_prompt} images are nothing to draw: give one or more"
        )
    if len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    pairs = zip(prompts, negatives, strict=True)
    return [Request(text, against, index) for text, against in pairs for index in range(num_images_per_prompt)]


# ---- the command ----


def sample(cfg: DictConfig) -> None:
    """Draw the prompts of the command line into a folder."""
    refuse_other_types(cfg)
    folder = Path(cfg.run).expanduser()
    prompts = read_prompts(cfg.prompts)
    negative = "" if cfg.negative is None else str(cfg.negative)
    requests = requests_of(prompts, negative, cfg.num_images)
    pipeline = Pipeline.from_run(folder, cfg.device)
    settings = pipeline.settings(
        seed=cfg.seed,
        solver=cfg.solver,
        steps=cfg.steps,
        guidance=cfg.guidance,
        guidance_interval=cfg.guidance_interval,
        guidance_rescale=cfg.guidance_rescale,
        height=cfg.height,
        width=cfg.width,
    )
    for note in generation.notes(pipeline.model.text, [*prompts, negative]):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    out = Path(cfg.out).expanduser() if cfg.out else folder / "sampled" / f"{datetime.now():%Y%m%d-%H%M%S}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"out={out} is a file, or lies below one: name a folder") from error
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(f"drawing {len(requests)} pictures", total=None)
        images = pipeline.generate(requests, settings, lambda done, of: bar.update(task, completed=done, total=of))
    columns = cfg.num_images if min(cfg.num_images, len(prompts)) > 1 else pictures.near_square(len(requests))
    *_, sheet = pictures.write_pictures(
        out, images, requests, settings, columns=columns, weights=pipeline.description["sha256"]
    )
    noun = "picture" if len(requests) == 1 else "pictures"
    console.print(f"{len(requests)} {noun} and {sheet}", highlight=False, markup=False, soft_wrap=True)


def refuse_other_types(cfg: DictConfig) -> None:
    """Raises UserError for a word where a number belongs."""
    for key in ("seed", "num_images", "steps", "height", "width"):
        if not isinstance(cfg[key], int) and (cfg[key] is not None or key in ("seed", "num_images")):
            raise UserError(f"{key}={cfg[key]} must be a whole number")
    if not isinstance(cfg.guidance_interval, ListConfig):
        raise UserError(f"guidance_interval={cfg.guidance_interval} must be two times: [0,1] is everywhere")
    numbers = [("guidance", cfg.guidance), ("guidance_rescale", cfg.guidance_rescale)]
    numbers += [("guidance_interval", t) for t in cfg.guidance_interval]
    for key, value in numbers:
        if not isinstance(value, (int, float)) and (value is not None or key != "guidance"):
            raise UserError(f"{key}={value} must be a number")


def read_prompts(given: Any) -> list[str]:
    """Prompts from a list, a single text, or the lines of a file whose name ends in .txt.

    Raises:
        UserError: there is none, or the file can't be read.
    """
    if isinstance(given, (list, ListConfig)):
        prompts = [str(prompt) for prompt in given]
    elif str(given).endswith(".txt"):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"prompts={given} can't be read ({reason}): give a text file, one prompt a line") from error
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = [] if given is None else [str(given)]
    if not prompts:
        raise UserError("""there are no prompts: give 'prompts=["a red heart"]', or prompts=FILE.txt, one a line""")
    return prompts
