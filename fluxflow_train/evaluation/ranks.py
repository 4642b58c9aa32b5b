"""One evaluation on several processes: who takes what, and how they wait for each other.

Pictures and features never travel between processes: they meet in the evaluation's folder, which all must see. What
is exchanged is a few bytes, so gloo serves on any device.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fluxflow_train.errors import UserError

WAIT = timedelta(hours=2)  # for the slowest share, or for the first rank's statistics

Item = TypeVar("Item")


class Ranks(NamedTuple):
    """This process among all: `rank` of `world`, and `local` among those of its machine."""

    rank: int
    world: int
    local: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every world-th of `items`; nothing is padded, so a rank may have none."""
        return items[self.rank :: self.world]

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, plain JSON, on every rank.

        Where it raises there, that error is the answer, and the others end without one of their own.
        """
        if self.world == 1:
            return make()
        if not self.is_first:
            answer = json.loads(exchange(b""))
            if "failed" in answer:
                raise SystemExit(1)
            return answer["value"]
        try:
            value = make()
        except BaseException:
            exchange(b'{"failed": true}')
            raise
        exchange(json.dumps({"value": value}).encode())
        return value

    def wait(self) -> None:
        """Until every rank is here. Raises UserError where one has stopped."""
        if self.world > 1:
            with others():
                dist.barrier()


@contextmanager
def others() -> Iterator[None]:
    """What a process group says when another rank is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another rank stopped or is silent ({str(error).splitlines()[0][:80]}): see what it said, then run the "
            "same command again, which goes on from here"
        ) from error


def exchange(data: bytes) -> bytes:
    """The first rank's bytes."""
    with others():
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
    return buffer.numpy().tobytes()


def placed(environment: dict[str, str]) -> Ranks:
    """By torchrun's variables, else by srun's where MASTER_ADDR and MASTER_PORT say where to meet; else alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world, local = (environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif {"SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        rank, world = environment["SLURM_PROCID"], environment["SLURM_NTASKS"]
        local = environment.get("SLURM_LOCALID", "0")
    else:
        return Ranks(0, 1, 0)
    return Ranks(int(rank), int(world), int(local))


@contextmanager
def process_group() -> Iterator[Ranks]:
    """This process's place; inside, the group of all processes, where there are several.

    Raises:
        UserError: the others don't come.
    """
    ranks = placed(dict(os.environ))
    if ranks.world == 1:
        yield ranks
        return
    with others():
        dist.init_process_group("gloo", timeout=WAIT, rank=ranks.rank, world_size=ranks.world)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
