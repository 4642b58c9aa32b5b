"""The endless line of training samples: a function of the seed alone, never of workers, ranks or restarts.

Each dataset's epochs are laid end to end, so no sample is left out or padded at the end of one; several datasets are
mixed by weight. The line is made in stretches of STRETCH positions, any of which can be asked for.

N samples of all datasets together, numbered dataset by dataset, shard by shard.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxflow_train import rng

STRETCH = 2048


class Part(NamedTuple):
    """One dataset of a line: the usable samples of each of its shards, and its share of what is seen, in any unit."""

    shard_sizes: list[int]
    weight: float = 1.0


def epoch_order(seed: int, epoch: int, shard_sizes: list[int], window_shards: int, dataset: int = 0) -> np.ndarray:
    """A permutation of range(N), int64 (N,): shards permuted, then samples shuffled within windows of shards.

    A reader then has at most `window_shards` shards in use at a time, which keeps a disk or a network share quick.
    """
    draws = rng.generator(seed, "order", epoch, *([dataset] if dataset else []))
    starts = [0, *np.cumsum(shard_sizes).tolist()]
    shards = draws.permutation(len(shard_sizes))
    parts = []
    for first in range(0, len(shards), window_shards):
        window = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window_shards]]
        parts.append(draws.permutation(np.concatenate(window)))
    return np.concatenate(parts)


class Line:
    """(epoch, sample) at every position; the epoch is that of the sample's own dataset."""

    def __init__(self, seed: int, parts: Sequence[Part], window_shards: int) -> None:
        """
        Raises:
            ValueError: a dataset is empty, `window_shards` is below 1, or a weight is not above 0.
        """
        if window_shards < 1:
            raise ValueError(f"window_shards: got {window_shards}, expected at least 1")
        for part in parts:
            if sum(part.shard_sizes) < 1:
                raise ValueError(f"samples: got {sum(part.shard_sizes)}, expected at least 1")
        self.seed = seed
        self.window_shards = window_shards
        self.counts = apportion([part.weight for part in parts], STRETCH)
        self._parts = parts
        self._sizes = [sum(part.shard_sizes) for part in parts]
        self._starts = [0, *np.cumsum(self._sizes).tolist()]
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in parts]

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    def stretch(self, number: int) -> np.ndarray:
        """int64 (STRETCH, 2): epoch and sample at the positions from number * STRETCH on."""
        pairs = np.empty((STRETCH, 2), np.int64)
        which = np.repeat(np.arange(len(self._parts)), self.counts)
        if len(self._parts) > 1:
            which = rng.generator(self.seed, "mix", number).permutation(which)
        for dataset, count in enumerate(self.counts):
            pairs[which == dataset] = self._run(dataset, number * count, count)
        return pairs

    def tallies(self, number: int, bucket_of: np.ndarray, num_buckets: int) -> np.ndarray:
        """int64 (num_buckets,): how many samples of each bucket lie before stretch `number`."""
        tally = np.zeros(num_buckets, np.int64)
        for dataset, count in enumerate(self.counts):
            start, stop = self._starts[dataset : dataset + 2]
            epochs, within = divmod(number * count, stop - start)
            tally += epochs * np.bincount(bucket_of[start:stop], minlength=num_buckets)
            if within:
                begun = start + self._order(dataset, epochs)[:within]
                tally += np.bincount(bucket_of[begun], minlength=num_buckets)
        return tally

    def _run(self, dataset: int, first: int, count: int) -> np.ndarray:
        """(epoch, sample) of `count` positions of one dataset's own line."""
        runs = []
        while count:
            epoch, within = divmod(first, self._sizes[dataset])
            samples = self._order(dataset, epoch)[within : within + count]
            runs.append(np.stack([np.full_like(samples, epoch), samples + self._starts[dataset]], axis=1))
            first, count = first + len(samples), count - len(samples)
        return np.concatenate(runs)

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        orders = self._orders[dataset]
        if epoch not in orders:
            # One order is 8 bytes a sample, so no more than two are kept.
            self._orders[dataset] = orders = {old: order for old, order in orders.items() if old == epoch - 1}
            sizes = self._parts[dataset].shard_sizes
            orders[epoch] = epoch_order(self.seed, epoch, sizes, self.window_shards, dataset)
        return orders[epoch]


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` in whole numbers in proportion to `weights`, at least 1 for each: largest remainders first.

    Raises:
        ValueError: a weight is not above 0, or there are more of them than `total`.
    """
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights: got {list(weights)}, expected numbers above 0")
    if len(weights) > total:
        raise ValueError(f"weights: got {len(weights)}, expected at most {total}")
    # One is set aside for each, and the rest is shared out so that the whole comes as close to the weights as it can.
    exact = np.maximum(np.array(weights) / sum(weights) * total - 1, 0)
    exact *= (total - len(weights)) / exact.sum() if exact.sum() else 0
    counts = np.floor(exact).astype(int)
    rest = total - len(weights) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return (counts + 1).tolist()
