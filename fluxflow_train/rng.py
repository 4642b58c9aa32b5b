"""Every random draw of the project comes from (seed, purpose, index), never from a global generator.

So a draw depends on which sample it is for, not on the number of workers, ranks or batches before it.
"""

import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A counter-based stream of its own for (seed, purpose, index).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    """
    entropy = (seed, zlib.crc32(purpose.encode()), *index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def normal(seed: int, purpose: str, indices: Iterable[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of `shape` for each index, stacked: float32 on the CPU, shape (len(indices), *shape)."""
    draws = [generator(seed, purpose, *index).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(draws))


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for a `torch.Generator` or `torch.manual_seed`, where torch itself must draw."""
    return int(generator(seed, purpose, *index).integers(0, 2**63 - 1))
