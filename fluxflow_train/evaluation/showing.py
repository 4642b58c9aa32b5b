"""The pictures and curves of an evaluation's page, as plain numbers and base64 PNGs.

N pictures, F feature width, H W pixels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxflow_train.evaluation.images import Images
from fluxflow_train.evaluation.reference import RealFeatures
from fluxflow_train.evaluation.samples import KEPT, kept_picture, picture_path
from fluxflow_train.generation import Request
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.metrics.reconstruction import psnr
from fluxflow_train.pixels import dequantize
from fluxflow_train.reports import figures
from fluxflow_train.reports.drawing import Artist
from fluxflow_train.reports.figures import picture
from fluxflow_train.reports.flow_figures import CELL
from fluxflow_train.reports.passes import Example
from fluxflow_train.reports.real_images import NUM_NEIGHBOURS

NUM_TRIPLES = 16
NUM_QUERIES = 8


def shown_numbers(pictures: Path, count: int, most: int) -> list[int]:
    """The first numbers whose pictures are still there."""
    return [number for number in range(min(count, KEPT, most)) if picture_path(pictures, number).exists()]


def triples(images: Images, pictures: Path, count: int) -> list[dict[str, Any]]:
    """Input, reconstruction and difference of the first images of the list."""
    numbers = shown_numbers(pictures, count, NUM_TRIPLES)
    captions, originals = images.captions(numbers), images.read(numbers)
    found = []
    for number, caption, image in zip(numbers, captions, originals, strict=True):
        made = kept_picture(pictures, number)
        value = float(psnr(image[None], made[None]))
        found.append(figures.example(Example(number, images.keys[number], caption, value, image, made)))
    return found


def captioned(images: Images, pictures: Path, count: int) -> list[dict[str, str]]:
    """What was drawn for the first captions of the list."""
    numbers = shown_numbers(pictures, count, KEPT)
    pairs = zip(numbers, images.captions(numbers), strict=True)
    return [{"caption": caption, "image": picture(kept_picture(pictures, number), CELL)} for number, caption in pairs]


def neighbours(
    images: Images, pictures: Path, drawn: Tensor, train: RealFeatures, extractor: Extractor, device: torch.device
) -> list[dict[str, Any]]:
    """The first pictures, features `drawn` (N, F), with the nearest training images; beside them the real image's."""
    numbers = shown_numbers(pictures, len(drawn), NUM_QUERIES)
    if not numbers:
        return []
    real = extractor(images.read(numbers).to(device)).cpu()
    far, real_far = (torch.cdist(x.double(), train.features.double()) for x in (drawn[numbers], real))
    k = min(NUM_NEIGHBOURS, far.shape[1])
    found = []
    for row, (number, caption) in enumerate(zip(numbers, images.captions(numbers), strict=True)):
        near = far[row].argsort()[:k].tolist()
        shown = zip(near, train.images.read(near), strict=True)
        found.append(
            {
                "caption": caption,
                "image": picture(kept_picture(pictures, number), CELL),
                "real_distance": float(real_far[row].min()),
                "nearest": [
                    {
                        "key": train.images.keys[i],
                        "distance": round(float(far[row, i]), 4),
                        "image": picture(image, CELL),
                    }
                    for i, image in shown
                ],
            }
        )
    return found


def vae_curves(vae: nn.Module, images: Images, device: torch.device) -> list[dict[str, Any]]:
    """The learned Beziers, with where their inputs lie on the first image."""
    x = dequantize(images.read([0]).to(device))
    eps = torch.zeros(1, *vae.latent_shape(*x.shape[-2:]), device=device)  # type: ignore[operator]
    return figures.learned_curves(vae, lambda: vae(x, eps))


def flow_curves(artist: Artist, images: Images) -> list[dict[str, Any]]:
    """As `vae_curves`, of the text projection and the flow while one picture is drawn."""
    request = [Request(images.captions([0])[0], "", 0)]
    return [
        entry | {"name": f"{part}.{entry['name']}"}
        for part in ("text", "flow")
        for entry in figures.learned_curves(getattr(artist.model, part), lambda: artist.draw(request, lambda _: None))
    ]
