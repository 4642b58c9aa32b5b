"""A rank's share of a batch in smaller parts, for gradients that are accumulated."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fluxflow_train.errors import UserError


def split(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` equal parts, in order; every entry of `batch` is a tensor (B, ...) or a list of B.

    Raises:
        UserError: `count` doesn't divide B.
    """
    size = len(batch["index"])
    if size % count:
        raise UserError(
            f"task.num_micro_batches={count} doesn't divide the {size} images that each rank takes of a batch: choose "
            "another, or another scale.batch_size"
        )
    step = size // count
    return [{name: values[first : first + step] for name, values in batch.items()} for first in range(0, size, step)]


def mean(logs: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The means of what each part logged; all parts log the same names."""
    parts = list(logs)
    return {name: torch.stack([part[name].detach() for part in parts]).mean(0) for name in parts[0]}
