"""What Lightning iterates: batches in the global order with an exact state, and evaluation batches.

Neither is a `DataLoader`, so Lightning leaves their order alone; each holds one.
"""

import atexit
import ctypes
import logging
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fluxflow_train.data.reader import BatchReader, Fetched, Request
from fluxflow_train.data.sampler import GlobalOrder
from fluxflow_train.data.selection import Selection
from fluxflow_train.errors import UserError
from fluxflow_train.preemption import SIGNALS

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of Linux' prctl
SMALL = 2**18  # bytes of a tensor that comes over sooner by pipe than by shared memory

_MEANING = {
    "seed": "the seed",
    "batch_size": "the global batch size",
    "window_shards": "the shuffling window",
    "mix": "the mixture of the datasets",
    "buckets": "the shapes of the images",
    "fingerprint": "the training data",
    "vae_sha256": "the VAE of the latents",
    "text_fingerprint": "the text backbone",
}


class TrainLoader:
    """The whole training as one pass of `num_batches` global batches; this process gets its slice of each.

    Its state is the number of batches that were yielded here, in the main process: those that workers have ready
    don't count. After `load_state_dict` the pass goes on from there. A second pass yields nothing: the budget is spent.
    """

    def __init__(
        self, reader: BatchReader[Any], order: GlobalOrder, num_batches: int, rank: int, world: int, num_workers: int
    ) -> None:
        if order.batch_size % world:
            raise UserError(
                f"batch_size {order.batch_size} can't be shared by {world} processes: make it a multiple of {world}"
            )
        self._reader = reader
        self._order = order
        self._num_batches = num_batches
        self._rank, self._world = rank, world
        self._num_workers = num_workers
        self._done = 0
        self._damaged: dict[int, str] = {}
        self._iterator: Any = None  # Lightning shuts down the workers of what it finds under this name

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        requests = _requests(self._order, range(self._done, self._num_batches), self._rank, self._world)
        self._iterator = iter(_torch_loader(self._reader, requests, self._num_workers, persistent=False))
        for fetched in self._iterator:
            batch = checked(fetched)
            self._count(fetched.damaged)
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: how far the pass has come, and what its order depends on."""
        return {"batches_done": self._done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: it was taken with another order of samples; names what differs.
        """
        identity = self._identity()
        for name, meaning in _MEANING.items():
            now, then = identity.get(name), state.get(name)  # latents and images don't have the same names
            if now != then:
                raise UserError(
                    f"can't resume: {meaning} ({name}) is {now} but was {then} when the checkpoint was written;"
                    " set it back, or start a new run"
                )
        self._done = state["batches_done"]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._order.line.seed,
            "batch_size": self._order.batch_size,
            "window_shards": self._order.line.window_shards,
            "mix": self._order.line.counts,
            "buckets": self._reader.buckets.fingerprint,
            **self._reader.identity,
        }

    def _count(self, damaged: dict[int, str]) -> None:
        """Count each damaged sample once, say so ever more seldom, and stop where they are too many."""
        for sample, cause in damaged.items():
            if sample in self._damaged:
                continue
            self._damaged[sample] = cause
            count = len(self._damaged)
            if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                name = self._reader.selection.name(sample)
                log.warning("%s: %s; the next sample stands in (%d so far)", name, cause, count)
            check_damage(self._reader.selection, self._damaged)


class EvalLoader:
    """The same `batches` of samples each time it is iterated.

    `tolerant`: the next whole image stands in for a damaged one, instead of an error.
    `damaged` holds the cause by sample of those that were met so far.
    """

    def __init__(
        self, reader: BatchReader[Any], batches: list[Request], num_workers: int, tolerant: bool = False
    ) -> None:
        self.damaged: dict[int, str] = {}
        self._reader = reader
        self._tolerant = tolerant
        self._batches = batches
        self._loader = _torch_loader(reader, batches, num_workers, persistent=True)

    @property
    def _iterator(self) -> Any:
        """Lightning shuts down the workers of what it finds under this name, and sets it to None."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises UserError at a damaged image, unless `tolerant`: without it the figures are figures of other data."""
        for fetched in self._loader:
            batch = checked(fetched)
            self.damaged.update(fetched.damaged)
            for sample, cause in () if self._tolerant else fetched.damaged.items():
                name = self._reader.selection.name(sample)
                raise UserError(f"{name}: {cause}; take it out of the shard, since evaluation skips nothing")
            yield batch


def _requests(order: GlobalOrder, numbers: range, rank: int, world: int) -> Iterator[Request]:
    # No method: a reference to the loader would close a cycle, and when the garbage collector takes a cycle apart the
    # queues go before the workers, which then are waited for in vain, 5 s each.
    return (order.batch(number, rank, world) for number in numbers)


def _torch_loader(
    reader: BatchReader[Any], requests: Iterable[Request], num_workers: int, persistent: bool
) -> DataLoader[Fetched]:
    workers: dict[str, Any] = {}
    pinned = torch.cuda.is_available()
    collate: Any = _as_is if pinned or not num_workers else _light
    if num_workers:
        # Workers never touch a device, so forking is safe where it is the quick way to start them.
        workers = {
            "multiprocessing_context": "fork" if sys.platform == "linux" else "spawn",
            "worker_init_fn": _start_worker,
            "persistent_workers": persistent,
        }
    return DataLoader(
        reader,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pinned,
        generator=torch.Generator(),  # else every pass draws a seed from the global generator
        **workers,
    )


def _as_is(fetched: Fetched) -> Fetched:
    return fetched


def _light(fetched: Fetched) -> Fetched:
    """Small tensors as arrays, which are pickled: what is in shared memory has to be asked for, a millisecond a tensor.

    Not where batches are pinned, which is done to tensors alone.
    """
    small = {
        name: value.numpy()
        for name, value in fetched.batch.items()
        if isinstance(value, torch.Tensor) and value.nbytes <= SMALL and value.dtype != torch.bfloat16
    }
    return fetched._replace(batch={**fetched.batch, **small})


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group, and SLURM's signals every process of a job; the main process decides.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The end of a killed main process is no end for a worker that is handing over a batch: it would wait for ever,
        # and hold the run's lock.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def _end_workers() -> None:
    # multiprocessing would end them with a SIGTERM, which they ignore, and wait; this runs before it.
    for worker in multiprocessing.active_children():
        worker.kill()


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Raises UserError where a data worker died: torch raises in the middle of whatever the main process was doing."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data worker died ({str(error).splitlines()[0].rstrip('. ')}): if the machine ran out of memory, lower "
            "data.num_workers or data.cache_bytes; the same command goes on from the last checkpoint"
        ) from error


def checked(fetched: Fetched) -> dict[str, Any]:
    """The batch. Raises UserError where the worker met one."""
    if fetched.error:
        raise UserError(fetched.error)
    batch = fetched.batch
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def check_damage(selection: Selection, met: dict[int, str]) -> None:
    """Raises UserError if the samples of `met` and those that the index knew of are more than the policy allows."""
    causes = selection.damaged + Counter(met.values())
    selection.check_damage(sum(causes.values()), dict(causes))
