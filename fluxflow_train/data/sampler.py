"""The order of the training samples: a function of the seed alone, never of workers, ranks or restarts.

The epochs' orders are laid end to end and the line is cut into global batches of G samples. So no sample is left out
or padded at the end of an epoch, an epoch may be smaller than G, and after any number of batches no sample has been
seen more than once more often than another. A batch that spans two epochs may hold a sample twice.

G samples of a global batch, N samples of the dataset.
"""

import numpy as np

from fluxflow_train import rng


def epoch_order(seed: int, epoch: int, shard_sizes: list[int], window_shards: int) -> np.ndarray:
    """A permutation of range(N), int64 (N,): shards permuted, then samples shuffled within windows of shards.

    A reader then has at most `window_shards` shards in use at a time, which keeps a disk or a network share quick.
    """
    draws = rng.generator(seed, "order", epoch)
    starts = [0, *np.cumsum(shard_sizes).tolist()]
    shards = draws.permutation(len(shard_sizes))
    parts = []
    for first in range(0, len(shards), window_shards):
        window = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window_shards]]
        parts.append(draws.permutation(np.concatenate(window)))
    return np.concatenate(parts)


class GlobalOrder:
    """Batches of (epoch, sample) pairs; every rank asks for the same global batch and takes its own slice."""

    def __init__(self, seed: int, shard_sizes: list[int], window_shards: int, batch_size: int) -> None:
        for name, value in (
            ("samples", sum(shard_sizes)),
            ("window_shards", window_shards),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.seed = seed
        self.shard_sizes = shard_sizes
        self.window_shards = window_shards
        self.batch_size = batch_size
        self._num_samples = sum(shard_sizes)
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, number: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The slice of `rank` of global batch `number`: G / world pairs; `world` must divide G."""
        if self.batch_size % world:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a multiple of the {world} processes")
        share = self.batch_size // world
        first = number * self.batch_size + rank * share
        return [self._at(position) for position in range(first, first + share)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, within = divmod(position, self._num_samples)
        if epoch not in self._epochs:
            # A batch at the border of two epochs needs both; one order is 8 bytes a sample, so no more are kept.
            self._epochs = {old: order for old, order in self._epochs.items() if old == epoch - 1}
            self._epochs[epoch] = epoch_order(self.seed, epoch, self.shard_sizes, self.window_shards)
        return epoch, int(self._epochs[epoch][within])


def eval_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """The batches of `rank` over each sample once: samples rank, rank + world, ...; nothing padded or dropped.

    `batch_size` is the global one; the last batch is smaller, and ranks may differ by one batch.
    """
    share = max(1, batch_size // world)
    mine = [(0, sample) for sample in range(rank, num_samples, world)]
    return [mine[first : first + share] for first in range(0, len(mine), share)]
