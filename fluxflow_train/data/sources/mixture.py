"""Several datasets trained on as one, each with its share of the images seen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fluxflow_train.data.line import STRETCH
from fluxflow_train.data.sources import SPLITS, Split
from fluxflow_train.data.sources.shards import expand_braces
from fluxflow_train.errors import UserError


class Dataset(NamedTuple):
    """One part of a mixture: how many shards it has, and its weight."""

    name: str
    num_shards: int
    weight: float


class Mixture:
    """WebDataset tars by name: `{"photos": {"train": "/data/photos-{000..099}.tar", "weight": 3}, ...}`.

    Of the images seen in training, each dataset gives its weight's part, whatever its size; a small one comes round
    more often. `val` serves as the tune split, and as the test split too unless `test` is given.
    """

    def __init__(self, mix: Mapping[str, Mapping[str, Any]], val: str, test: str | None = None) -> None:
        """
        Raises:
            ValueError: a dataset has other keys than `train` and `weight`, a weight that is no number above 0 or below
                1/2048 of the sum, or a shard of another.
        """
        if not mix:
            raise ValueError("mix: got nothing, expected {NAME: {train: PATTERN, weight: W}, ...}")
        for name, dataset in mix.items():
            if not isinstance(dataset, Mapping) or set(dataset) != {"train", "weight"}:
                raise ValueError(f"mix.{name}: got {dataset}, expected {{train: PATTERN, weight: W}}")
            weight = dataset["weight"]
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ValueError(f"mix.{name}.weight: got {weight!r}, expected a number above 0")
        total = sum(dataset["weight"] for dataset in mix.values())
        for name, dataset in mix.items():
            if dataset["weight"] * STRETCH < total:
                raise ValueError(f"mix.{name}.weight: got {dataset['weight']}, below 1/{STRETCH} of the sum {total}")
        self._train = {name: expand_braces(dataset["train"]) for name, dataset in mix.items()}
        self._weights = {name: float(dataset["weight"]) for name, dataset in mix.items()}
        self._patterns: dict[Split, str] = {"tune": val, "test": val if test is None else test}
        owner: dict[str, str] = {}
        for name, shards in self._train.items():
            for shard in shards:
                if owner.setdefault(shard, name) != name:
                    raise ValueError(f"mix.{name}: shard {shard} is in {owner[shard]} already")

    def prepare(self) -> None:
        """Nothing to write: the tars are there."""

    def shards(self, split: Split) -> list[str]:
        """The paths of `split`; those of training dataset by dataset."""
        if split not in SPLITS:
            raise UserError(f"there is no split {split}: it is one of {', '.join(SPLITS)}")
        if split == "train":
            return [shard for shards in self._train.values() for shard in shards]
        return expand_braces(self._patterns[split])

    @property
    def datasets(self) -> list[Dataset]:
        """The parts of the train split, in the order of its shards."""
        return [Dataset(name, len(shards), self._weights[name]) for name, shards in self._train.items()]
