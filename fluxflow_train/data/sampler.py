"""The batches of training, cut from the endless line of samples, and those of an evaluation.

Every global batch is of one bucket, so that ranks never wait for one with a larger shape. Each bucket's samples are
taken in the line's order and a batch is complete with its G-th; so no sample is dropped, and with one bucket the line
is simply cut. A batch that spans two epochs may hold a sample twice.

G samples of a global batch, K buckets.
"""

import numpy as np

from fluxflow_train.data.line import STRETCH, Line


class GlobalOrder:
    """Batches of (epoch, sample) pairs; every rank asks for the same global batch and takes its own slice.

    Batches in sequence are cheap; one somewhere else on the line costs a look at the epoch's order.
    """

    def __init__(self, line: Line, bucket_of: np.ndarray, batch_size: int) -> None:
        """`bucket_of`: the bucket of every sample of the line, integers (N,)."""
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        assert len(bucket_of) == line.num_samples
        self.line = line
        self.batch_size = batch_size
        self._bucket_of = bucket_of
        self._num_buckets = int(bucket_of.max()) + 1
        self._first = 0  # number of the first batch in hand
        self._batches: list[np.ndarray] = []  # those completed in the last stretch, each (G, 2)
        self._next = 0  # the stretch to look at next
        self._pending = [np.empty((0, 2), np.int64)] * self._num_buckets  # of each bucket, short of a batch

    def batch(self, number: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The slice of `rank` of global batch `number`: G / world pairs; `world` must divide G."""
        if self.batch_size % world:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a multiple of the {world} processes")
        # The stretch that completes it is at least this one: where all that came before had made whole batches.
        earliest = number * self.batch_size // STRETCH
        if number < self._first or earliest > self._next:
            self._jump(earliest)
        while number >= self._first + len(self._batches):
            self._advance()
        share = self.batch_size // world
        pairs = self._batches[number - self._first][rank * share : (rank + 1) * share]
        return [(epoch, sample) for epoch, sample in pairs.tolist()]

    def _advance(self) -> None:
        """Complete the batches of the next stretch, in the order of the samples that complete them."""
        pairs = self.line.stretch(self._next)
        buckets = self._bucket_of[pairs[:, 1]]
        completed = []
        for bucket in np.unique(buckets):
            mine = np.flatnonzero(buckets == bucket)
            waiting = len(self._pending[bucket])
            joined = np.concatenate([self._pending[bucket], pairs[mine]])
            whole = len(joined) // self.batch_size
            for part in range(whole):
                stop = (part + 1) * self.batch_size
                completed.append((mine[stop - waiting - 1], joined[stop - self.batch_size : stop]))
            self._pending[bucket] = joined[whole * self.batch_size :]
        self._first += len(self._batches)
        self._batches = [batch for _, batch in sorted(completed, key=lambda at: at[0])]
        self._next += 1

    def _jump(self, stretch: int) -> None:
        """Be where `_advance` would have come to before it looks at `stretch`."""
        tallies = self.line.tallies(stretch, self._bucket_of, self._num_buckets)
        self._first, self._batches, self._next = int((tallies // self.batch_size).sum()), [], stretch
        short = tallies % self.batch_size
        found: list[list[np.ndarray]] = [[] for _ in short]
        earlier = stretch
        while short.any():
            earlier -= 1
            pairs = self.line.stretch(earlier)
            buckets = self._bucket_of[pairs[:, 1]]
            for bucket in np.flatnonzero(short):
                last = pairs[buckets == bucket][-short[bucket] :]
                found[bucket].insert(0, last)
                short[bucket] -= len(last)
        nothing = np.empty((0, 2), np.int64)
        self._pending = [np.concatenate([nothing, *pieces]) for pieces in found]


def eval_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """The batches of `rank` over each sample once: samples rank, rank + world, ...; nothing padded or dropped.

    `batch_size` is the global one; the last batch is smaller, and ranks may differ by one batch.
    """
    share = max(1, batch_size // world)
    mine = [(0, sample) for sample in range(rank, num_samples, world)]
    return [mine[first : first + share] for first in range(0, len(mine), share)]
