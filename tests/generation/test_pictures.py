from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from fluxflow_train.generation import Request, Settings
from fluxflow_train.pictures import LINE, MARGIN, grid, near_square, png, shared, shortened, to_pil, write_pictures
from fluxflow_train.sampling import Guidance

SETTINGS = Settings(
    solver="heun",
    steps=12,
    guidance=Guidance(4.5, (0.1, 0.9), 0.25),
    height=16,
    width=24,
    seed=3,
    micro_batch=8,
)
REQUESTS = [Request("a red heart", "ugly", 0), Request("❤ \0 \ud800 сердце", "", 7), Request("", "", 1)]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_files_hold_the_pixels_and_how_they_were_made(tmp_path: Path, images: Tensor) -> None:
    paths = write_pictures(tmp_path / "out", images, REQUESTS, SETTINGS, columns=2, weights="abc")
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "grid.png"]
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    opened: list = [Image.open(path) for path in paths]
    for file, image in zip(opened, images, strict=False):
        assert np.array_equal(np.asarray(file).transpose(2, 0, 1), image.numpy())
    common = {
        "seed": "3",
        "solver": "heun",
        "steps": "12",
        "guidance": "4.5",
        "guidance_interval": "0.1 0.9",
        "guidance_rescale": "0.25",
        "size": "24x16",
    }
    heart = {"prompt": "a red heart", "negative_prompt": "ugly", "index": "0", "weights": "abc"}
    assert dict(opened[0].text) == common | heart
    assert opened[1].text["prompt"] == "❤  ? сердце"
    assert dict(opened[3].text) == common


def test_the_same_picture_is_the_same_bytes(tmp_path: Path, images: Tensor) -> None:
    first = write_pictures(tmp_path / "a", images, REQUESTS, SETTINGS, columns=2, weights="abc")
    second = write_pictures(tmp_path / "b", images.clone(), REQUESTS, SETTINGS, columns=2, weights="other")
    assert first[-1].read_bytes() == second[-1].read_bytes()
    assert first[0].read_bytes() != second[0].read_bytes()
    sheet = grid(images, [request.prompt for request in REQUESTS], 2)
    assert first[-1].read_bytes() == png(sheet, shared(SETTINGS, weights=None))


def test_grid_places_row_by_row_over_captions(images: Tensor) -> None:
    sheet = np.asarray(grid(images, ["first", "", "third"], 2))
    scale = 6  # the least that makes 24 pixels 128 wide
    height, width = 16 * scale, 24 * scale
    assert sheet.shape == (MARGIN + 2 * (height + LINE + MARGIN), MARGIN + 2 * (width + MARGIN), 3)
    for number in range(3):
        row, column = divmod(number, 2)
        y, x = MARGIN + row * (height + LINE + MARGIN), MARGIN + column * (width + MARGIN)
        cell = sheet[y : y + height, x : x + width]
        assert np.array_equal(cell[::scale, ::scale].transpose(2, 0, 1), images[number].numpy())
        caption = sheet[y + height : y + height + LINE, x : x + width]
        assert (caption.min() < 128) == (number != 1)
    assert (sheet[MARGIN + height + LINE + MARGIN :, MARGIN + width + MARGIN :] == 255).all()


def test_large_pictures_keep_their_size() -> None:
    image = torch.zeros(1, 3, 200, 200, dtype=torch.uint8)
    assert grid(image, [""], 1).size == (200 + 2 * MARGIN, 200 + 2 * MARGIN + LINE)


def test_captions_fit_their_picture() -> None:
    font = ImageFont.load_default(11)
    assert shortened("a red\n heart ❤", 128, font) == "a red heart"
    assert shortened("❤🔥", 128, font) == ""
    cut = shortened("a very long caption " * 1000, 128, font)
    assert cut.startswith("a very long") and cut.endswith("...") and 100 < font.getlength(cut) <= 128


@pytest.mark.parametrize(("count", "columns"), [(0, 1), (1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (64, 8)])
def test_grids_are_near_square(count: int, columns: int) -> None:
    assert near_square(count) == columns


def test_pil_image_has_the_pixels(images: Tensor) -> None:
    assert to_pil(images[0]).size == (24, 16)
    assert to_pil(images[0]).getpixel((5, 2)) == tuple(images[0, :, 2, 5].tolist())
