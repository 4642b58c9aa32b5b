"""The pictures of a text-to-image report, as base64 PNGs with what stands beside them.

P prompts, K noises or guidance scales, H W pixels.
"""

import math
import re
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fluxflow_train.reports.drawing import Drawn
from fluxflow_train.reports.figures import encoded, picture
from fluxflow_train.reports.real_images import Neighbour, SplitImages

CELL = 128  # the largest side of a small picture: there are about two hundred of them
GRID_IMAGES = 64
SHEET = 640
MAX_SHEETS = 8


def captioned(drawn: Drawn, real: SplitImages) -> list[dict[str, str]]:
    """The first 64 captions and what was drawn for them."""
    pairs = zip(drawn.images[:GRID_IMAGES], real.captions, strict=False)
    return [{"caption": caption, "image": picture(image, CELL)} for image, caption in pairs]


def rows(prompts: list[str], images: Tensor) -> list[dict[str, Any]]:
    """A row of pictures for each prompt; images uint8 (P, K, 3, H, W)."""
    return [
        {"prompt": prompt, "images": [picture(image, CELL) for image in row]}
        for prompt, row in zip(prompts, images, strict=False)
    ]


def neighbours(
    drawn: Drawn, real: SplitImages, nearest: list[list[Neighbour]], real_nearest: list[float]
) -> list[dict[str, Any]]:
    """The first samples with their nearest training images; beside them, how far the real image of the caption is."""
    return [
        {
            "caption": caption,
            "image": picture(image, CELL),
            "real_distance": real_distance,
            "nearest": [
                {"key": n.key, "distance": round(n.distance, 4), "image": picture(n.image, CELL)} for n in found
            ],
        }
        for image, caption, found, real_distance in zip(
            drawn.images, real.captions, nearest, real_nearest, strict=False
        )
    ]


def training_samples(folder: Path) -> list[dict[str, Any]]:
    """Up to eight evenly spaced grids that training wrote: {images_seen, image}; [] where there are none."""
    found = {}
    for path in sorted(folder.glob("images_*.png")):
        match = re.fullmatch(r"images_(\d+)\.png", path.name)
        if match:
            found[int(match[1])] = path
    seen = sorted(found)
    count = min(len(seen), MAX_SHEETS)
    chosen = [seen[math.floor(i * (len(seen) - 1) / max(count - 1, 1) + 0.5)] for i in range(count)]
    sheets = []
    for images_seen in chosen:
        with Image.open(found[images_seen]) as sheet:
            sheets.append({"images_seen": images_seen, "image": encoded(sheet.convert("RGB"), SHEET)})
    return sheets
