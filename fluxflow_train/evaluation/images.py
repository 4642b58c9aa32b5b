"""The images of a split as a protocol numbers them: the same list on every machine that has the same data."""

import hashlib
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from fluxflow_train.data.buckets import Buckets
from fluxflow_train.data.index import Index
from fluxflow_train.data.loader import EvalLoader
from fluxflow_train.data.reader import ImageReader, PlainView
from fluxflow_train.data.selection import Policy, Selection
from fluxflow_train.data.sources import Source, Split
from fluxflow_train.data.sources.openmoji import OpenMoji
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.protocol import OWN, Protocol

OPENMOJI = "openmoji"


class TarFolder:
    """A dataset of shards in `root`/<name>-<split>/, made beforehand."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name

    def prepare(self) -> None:
        """Nothing to write: the tars are there."""

    def shards(self, split: str) -> list[str]:
        """Raises UserError where there are none."""
        folder = self.root / f"{self.name}-{split}"
        found = sorted(str(path) for path in folder.glob("*.tar"))
        if not found:
            raise UserError(
                f"there are no tars in {folder}: write them with scripts/coco_to_shards.py, or give data.root=DIR, "
                f"the folder that holds {folder.name}"
            )
        return found


def source_of(protocol: Protocol, own: Source | None, root: Path) -> Source | TarFolder:
    """Where a protocol's images come from; `own` are the run's data.

    Raises:
        UserError: the protocol leaves the data to a run, and there is none.
    """
    if protocol.dataset == OPENMOJI:
        return OpenMoji(str(root), int(protocol.resolution))
    if protocol.dataset != OWN:
        return TarFolder(root, protocol.dataset)
    if own is None:
        raise UserError(f"protocol {protocol.id} measures on a run's own data, and none was given")
    return own


class Images:
    """Images 0 to N - 1 of `split`, in the order of `place_in_list` of their keys, at `resolution`.

    Limits of images and what is done without a caption are fixed here: no option of a run changes the list.

    Raises:
        UserError: the split is not there.
    """

    def __init__(
        self,
        source: Source | TarFolder,
        split: str,
        resolution: int,
        cache: Path,
        num_workers: int,
    ) -> None:
        """`cache` takes indices of shards in read-only folders."""
        self.split, self.resolution, self.num_workers = split, resolution, num_workers
        self.selection = Selection(Index(shards_of(source, split), cache), Policy())
        keys = [self.selection.index.key(self.selection.row(sample)) for sample in range(len(self.selection))]
        self.samples = sorted(range(len(keys)), key=lambda i: (place_in_list(keys[i]), i))
        self.keys = [keys[sample] for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def first(self, count: int) -> "Images":
        """The list's first images alone, or all where there are no more."""
        part = copy(self)
        part.samples, part.keys = self.samples[:count], self.keys[:count]
        return part

    @property
    def list_sha256(self) -> str:
        return text_digest(self.keys)

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """The first caption of each image; "" where it has none."""
        index = self.selection.index
        found = (index.captions(self.selection.row(self.samples[number])) for number in numbers)
        return [next(iter(captions), "") for captions in found]

    def batches(self, chunks: Sequence[range]) -> Iterator[Tensor]:
        """uint8 (len(chunk), 3, R, R) of each chunk of numbers, decoded exactly.

        Raises:
            UserError: an image is damaged.
        """
        buckets = Buckets.square(self.resolution, len(self.selection))
        reader = ImageReader(self.selection, buckets, "exact", PlainView(), cache_bytes=0)
        requests = [[(0, self.samples[number]) for number in chunk] for chunk in chunks]
        for batch in EvalLoader(reader, requests, self.num_workers):
            yield batch["image"]

    def read(self, numbers: Sequence[int]) -> Tensor:
        """uint8 (N, 3, R, R) of some, given by number."""
        parts = list(self.batches([range(number, number + 1) for number in numbers]))
        return torch.cat(parts) if parts else torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)


def shards_of(source: Source | TarFolder, split: str) -> list[str]:
    try:
        if isinstance(source, TarFolder):
            return source.shards(split)
        known: Split = split  # type: ignore[assignment]
        return source.shards(known)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the protocol's split {split} is none of the data: {error}") from error


def place_in_list(key: str) -> str:
    """What a list is sorted by: sha256 of "evaluation <key>".

    Not of the key alone: by that, splits may have been made, and then the list's first part would be another
    population than the rest.
    """
    return hashlib.sha256(f"evaluation {key}".encode()).hexdigest()


def text_digest(lines: Sequence[str]) -> str:
    """sha256 of the lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
