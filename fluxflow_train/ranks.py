"""One command as several processes: which of them this is, how they meet, and how they wait for each other.

torchrun and srun start all processes at once; they meet here, before anything is decided, so that the first one can
decide for all. What is exchanged is a few bytes by gloo, on any device.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fluxflow_train import preemption
from fluxflow_train.errors import EXIT_STOPPED, Stopped, UserError

WAIT = timedelta(days=7)  # for what one rank does while the others wait; a rank that is gone is noticed at once
SILENCE = timedelta(minutes=30)  # in the middle of common work, after which a rank is taken for stuck
POLL = 0.05  # seconds between two looks at a barrier

Item = TypeVar("Item")


class Ranks(NamedTuple):
    """This process among all: `rank` of `world`, `local` among the `local_world` of its machine."""

    rank: int
    world: int
    local: int
    local_world: int = 1
    waiting: Any = None  # the group that ranks wait in, which is patient

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def machines(self) -> int:
        return self.world // self.local_world

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
            self.wait()
            answer = json.loads(exchange(b"", self.waiting))
            if "failed" in answer:
                raise SystemExit(answer["failed"])
            return answer["value"]
        try:
            value = make()
        except BaseException as error:
            self.wait()
            code = EXIT_STOPPED if isinstance(error, Stopped) else 1
            exchange(json.dumps({"failed": code}).encode(), self.waiting)
            raise
        self.wait()
        exchange(json.dumps({"value": value}).encode(), self.waiting)
        return value

    def wait(self) -> None:
        """Until every rank is here.

        Raises:
            UserError: another rank has stopped.
            Stopped: a signal came. (A blocking barrier would not let Python look.)
        """
        if self.world == 1:
            return
        with others():
            here = dist.barrier(self.waiting, async_op=True)
            assert here is not None
            while not here.is_completed():
                preemption.check()
                time.sleep(POLL)
            here.wait()


@contextmanager
def others() -> Iterator[None]:
    """What a process group says when another rank is gone, in words.

    A rank that was itself asked to end takes it that the others were, too.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost_another(error):
            raise
        preemption.check()
        raise UserError(
            f"another rank stopped or is silent ({str(error).splitlines()[0][:80]}): see what it said, then run the "
            "same command again, which goes on from here"
        ) from error


def lost_another(error: BaseException) -> bool:
    """Whether a collective failed because of another process: gloo says so by words only."""
    words = ("gloo", "onnection", "Timed out", "timeout", "Socket", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def exchange(data: bytes, group: Any) -> bytes:
    """The first rank's bytes."""
    with others():
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group)
    return buffer.numpy().tobytes()


# ---- over all ranks; alone, the identity ----


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, elementwise. The host doesn't wait for the device. Without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(item: Item) -> list[Item]:
    """What each rank has, plain data, by rank."""
    items: list[Any] = [item]
    if world_size() > 1:
        items = [None] * world_size()
        dist.all_gather_object(items, item)
    return items


def any_rank(mine: bool) -> bool:
    """Whether it is true on any rank: the same answer on all, exchanged on the host."""
    return any(gather(mine))


# ---- where this process stands ----


def placed(environment: dict[str, str]) -> Ranks:
    """By torchrun's variables, else by those of srun's step; else alone.

    The variables of a SLURM *job* say nothing of this process: a batch script, or a shell inside an allocation, has
    them too.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world, local, local_world = (
            int(environment.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        return Ranks(rank, world, local, local_world)
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world == 1:
        return Ranks(0, 1, 0)
    machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if world % machines:
        raise UserError(f"srun started {world} tasks on {machines} nodes: give each node as many (--ntasks-per-node)")
    return Ranks(int(environment["SLURM_PROCID"]), world, int(environment.get("SLURM_LOCALID", "0")), world // machines)


def meeting_point(environment: dict[str, str]) -> tuple[str, int]:
    """Host and port of the first rank of srun's step, the same on every rank, another for each job and step."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    host = SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return host, 15_000 + (16 * job + step) % 15_000


def backend() -> str:
    """Gloo for what is on the host, always; NCCL for what is on GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def process_group(chosen_backend: str = "gloo") -> Iterator[Ranks]:
    """This process's place; inside, the group of all processes, where torchrun or srun started several.

    Raises:
        UserError: the others don't come.
    """
    ranks = placed(dict(os.environ))
    if ranks.world == 1:
        yield ranks
        return
    if "RANK" not in os.environ:  # from here on srun's tasks look like torchrun's
        names = ("MASTER_ADDR", "MASTER_PORT")
        for name, value in zip(names, meeting_point(dict(os.environ)), strict=True):
            os.environ.setdefault(name, str(value))
        places = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_RANK": ranks.local}
        places |= {"LOCAL_WORLD_SIZE": ranks.local_world, "GROUP_RANK": ranks.rank // ranks.local_world}
        os.environ.update({name: str(value) for name, value in places.items()})
    with others():
        dist.init_process_group(chosen_backend, timeout=SILENCE, rank=ranks.rank, world_size=ranks.world)
        waiting = dist.new_group(backend="gloo", timeout=WAIT)
    try:
        yield ranks._replace(waiting=waiting)
    finally:
        part()


def part() -> None:
    """Leave the group: what one rank does from now on it does alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
