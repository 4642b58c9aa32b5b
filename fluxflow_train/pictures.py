"""Pictures as files: PNGs that say how they were made, and a grid of them.

Validation and `sample` both write here, and nothing of the time, the place or the command is in a file, so the same
picture is the same bytes. Legend: N images, H W pixels.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fluxflow_train.files import write_atomically
from fluxflow_train.generation import Request, Settings

GRID = "grid.png"
MARGIN = 6
CELL = 128  # the least width of a picture in a grid: smaller ones are enlarged by whole pixels, captions need room
LINE = 14  # height of a caption


def write_pictures(
    folder: Path,
    images: Tensor,
    requests: Sequence[Request],
    settings: Settings,
    *,
    columns: int,
    weights: str,
) -> list[Path]:
    """0000.png, 0001.png ... and grid.png of uint8 (N, 3, H, W).

    `weights`, the sha256 of the model's, is told in the pictures and not in the grid: training draws the same grid
    before its weights are a file. Returns the paths, the grid's last.
    """
    paths = [folder / f"{number:04d}.png" for number in range(len(images))]
    for path, image, request in zip(paths, images, requests, strict=True):
        write_atomically(path, png(to_pil(image), {**described(request), **shared(settings, weights)}))
    sheet = grid(images, [request.prompt for request in requests], columns)
    write_atomically(folder / GRID, png(sheet, shared(settings, weights=None)))
    return [*paths, folder / GRID]


def described(request: Request) -> dict[str, str]:
    """What tells an image from its neighbours."""
    return {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "index": str(request.index)}


def shared(settings: Settings, weights: str | None) -> dict[str, str]:
    """How all were made."""
    scale, (low, high), rescale = settings.guidance
    return {
        "seed": str(settings.seed),
        "solver": settings.solver,
        "steps": str(settings.steps),
        "guidance": f"{scale:g}",
        "guidance_interval": f"{low:g} {high:g}",
        "guidance_rescale": f"{rescale:g}",
        "size": f"{settings.width}x{settings.height}",
        **({"weights": weights} if weights is not None else {}),
    }


def png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """A PNG with `texts` in tEXt chunks, iTXt where they need more than Latin-1."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text.encode("utf-8", "replace").decode().replace("\0", ""))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) to RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def near_square(count: int) -> int:
    """Columns of a grid of `count` pictures about as wide as high."""
    return max(1, math.ceil(math.sqrt(count)))


def grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """uint8 (N, 3, H, W) on white, row by row, each over its caption cut to its width."""
    height, width = images.shape[-2:]
    scale = max(1, math.ceil(CELL / width))
    cell_height, cell_width = scale * height + LINE + MARGIN, scale * width + MARGIN
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (MARGIN + columns * cell_width, MARGIN + rows * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * cell_width, MARGIN + row * cell_height
        enlarged = to_pil(image).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        draw.text((x, y + scale * height + 1), shortened(caption, scale * width, font), fill="black", font=font)
    return sheet


def shortened(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """What the font can draw of a caption, on one line of at most `width` pixels."""
    line = " ".join(caption[:300].encode("latin-1", "ignore").decode("latin-1").split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip()}..."
