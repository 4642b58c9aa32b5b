"""Features and whatever else was measured of each image, kept so that a killed evaluation goes on where it stopped.

N images, F feature width. Images are numbered; a file holds the rows of a range of numbers, whoever made them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fluxflow_train.errors import UserError
from fluxflow_train.files import write_atomically
from fluxflow_train.metrics.extractor import state_sha256

MANIFEST = "manifest.json"
LARGEST = 64  # images of a file
FILES = 32  # that small sets are cut into at least, so that several ranks have something to do
TOLERANCE = 1e-4  # of fingerprints, relative: another machine's rounding is below it, another precision above


class FeatureStore:
    """Rows of images 0 to `count` - 1 in `folder`, of exactly what `identity` (plain JSON) says.

    Raises:
        UserError: the folder holds rows of something else, or its manifest can't be read.
    """

    def __init__(self, folder: Path, count: int, identity: dict[str, Any], remedy: str) -> None:
        """`remedy`: what helps where the folder can't be used."""
        self.folder, self.count, self.remedy = folder, count, remedy
        self.size = max(1, min(LARGEST, count // FILES))
        self.identity = {**identity, "count": count}
        self.compare_manifest()

    def compare_manifest(self) -> None:
        """Raises UserError where there is a manifest, and of something else."""
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}): {self.remedy}") from error
        different = difference(self.identity, found)
        if different:
            raise UserError(f"{self.folder} was made with another {different}: {self.remedy}")

    def manifest(self) -> dict[str, Any]:
        """What was written when the store was begun. Raises UserError where it is gone."""
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / MANIFEST} is missing or damaged: {self.remedy}") from error

    def begin(self) -> None:
        """Write the manifest, where there is none."""
        if not (self.folder / MANIFEST).exists():
            write_atomically(self.folder / MANIFEST, (json.dumps(self.identity, indent=1) + "\n").encode())

    def chunks(self, count: int) -> list[range]:
        """The ranges that together hold the first `count` images, and perhaps some more."""
        return [range(first, min(first + self.size, self.count)) for first in range(0, count, self.size)]

    def path(self, chunk: range) -> Path:
        return self.folder / f"{chunk.start:08d}-{chunk.stop:08d}.safetensors"

    def write(self, chunk: range, rows: Mapping[str, Tensor]) -> None:
        """Keep tensors (len(chunk), ...) by name, whole or not at all.

        Raises:
            ValueError: another number of rows.
        """
        for name, tensor in rows.items():
            if len(tensor) != len(chunk):
                raise ValueError(f"{name}: got {len(tensor)} rows, expected {len(chunk)}")
        tensors = {name: tensor.contiguous() for name, tensor in rows.items()}
        write_atomically(self.path(chunk), save(tensors, metadata={"sha256": state_sha256(tensors)}))

    def read_chunk(self, chunk: range) -> dict[str, Tensor] | None:
        """Its tensors; None where they are damaged. Raises FileNotFoundError where there are none."""
        path = self.path(chunk)
        if not path.exists():
            raise FileNotFoundError(path)
        try:
            with safe_open(path, "pt") as file:
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
                said = (file.metadata() or {}).get("sha256")
        except (SafetensorError, ValueError):
            return None
        if said != state_sha256(rows) or any(len(tensor) != len(chunk) for tensor in rows.values()):
            return None
        return rows

    def survey(self, count: int) -> tuple[list[range], list[range]]:
        """Of the ranges of the first `count` images, those that are absent, and those that are damaged."""
        absent, damaged = [], []
        for chunk in self.chunks(count):
            try:
                if self.read_chunk(chunk) is None:
                    damaged.append(chunk)
            except FileNotFoundError:
                absent.append(chunk)
        return absent, damaged

    def read(self, count: int) -> tuple[dict[str, Tensor], str]:
        """Tensors (count, ...) by name of the first `count` images, and a hash of them.

        Raises:
            UserError: some are not there, or damaged.
        """
        parts = []
        for chunk in self.chunks(count):
            try:
                rows = self.read_chunk(chunk)
            except FileNotFoundError:
                rows = None
            if rows is None:
                raise UserError(f"{self.path(chunk)} is missing or damaged: {self.remedy}")
            parts.append(rows)
        whole = {name: torch.cat([rows[name] for rows in parts])[:count] for name in parts[0]}
        return whole, state_sha256(whole)


def difference(ours: dict[str, Any], theirs: Any, prefix: str = "") -> str:
    """The first key whose values differ, numbers by more than rounding; "" where none does."""
    if not isinstance(theirs, dict):
        return prefix or "content"
    for key in sorted(ours.keys() | theirs.keys()):
        a, b, name = ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key
        if isinstance(a, dict):
            found = difference(a, b, name)
            if found:
                return found
        elif not (a == b or close(a, b)):
            return name
    return ""


def close(a: Any, b: Any) -> bool:
    """Whether both are lists of numbers that agree but for rounding."""
    if not all(isinstance(x, list) and all(isinstance(v, float) for v in x) for x in (a, b)) or len(a) != len(b):
        return False
    return all(abs(x - y) <= TOLERANCE * max(abs(x), abs(y), 1) for x, y in zip(a, b, strict=True))
