"""Make what a store lacks, shared over the ranks; what is there already is left as it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from rich.console import Console
from torch import Tensor

from fluxflow_train.data.lock import alone
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.store import FeatureStore
from fluxflow_train.ranks import Ranks
from fluxflow_train.reports.progress import progress

console = Console(stderr=True)

Make = Callable[[Sequence[range]], Iterator[dict[str, Tensor]]]
"""Rows of each range of image numbers, in turn: tensors by name, one row an image."""


def fill(store: FeatureStore, count: int, ranks: Ranks, make: Make, label: str) -> None:
    """Have the first `count` images in `store`, on every rank when this returns; one process of others at a time."""
    with ExitStack() as held:
        pending = ranks.first(lambda: claim(store, count, held))
        mine = ranks.share([range(start, stop) for start, stop in pending])
        with ExitStack() as shown:
            advance = shown.enter_context(progress(label, sum(map(len, mine)))) if ranks.is_first and mine else None
            for chunk, rows in zip(mine, make(mine), strict=True):
                store.write(chunk, rows)
                if advance is not None:
                    advance(len(chunk))
        ranks.wait()


def claim(store: FeatureStore, count: int, held: ExitStack) -> list[tuple[int, int]]:
    """Ranges of numbers that are to be made. Where there are any, the folder is locked until `held` is closed."""
    if store.survey(count)[0]:
        held.enter_context(alone(store.folder))
        store.compare_manifest()
        store.begin()
    return [(chunk.start, chunk.stop) for chunk in store.survey(count)[0]]


def discard_damaged(store: FeatureStore, count: int) -> None:
    """So that they are made again; says so."""
    for chunk in store.survey(count)[1]:
        path = store.path(chunk)
        path.unlink()
        console.print(f"{path} was damaged: its images are measured again", highlight=False, soft_wrap=True)


def refuse_damaged(store: FeatureStore, count: int) -> None:
    """Raises UserError, naming the first."""
    damaged = store.survey(count)[1]
    if damaged:
        raise UserError(f"{store.path(damaged[0])} is damaged: {store.remedy}")
