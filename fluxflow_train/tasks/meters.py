"""Means of logged scalars over the images between two records, kept on the device until they are read.

Each rank keeps those of its own share of the batches; a task averages what it reads over the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from fluxflow_train import ranks
from fluxflow_train.losses import at_least_fp32


class Meters:
    """Running means by name; each name is averaged over the steps that logged it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = at_least_fp32(value.detach())
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means since the last reading; waits for the device once."""
        if not self._sums:
            return {}
        device = list(self._sums.values())[-1].device  # sums that a checkpoint brought may still be on the CPU
        sums = torch.stack([total.to(device, torch.float64) for total in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """On the CPU; waits for the device."""
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """From the states of all ranks that there were; where their number is another now, each gets the mean."""
        sums = [state["sums"] for state in states]
        if len(sums) == ranks.world_size():
            self._sums = dict(sums[rank])
        else:
            self._sums = {name: torch.stack([each[name] for each in sums]).mean(0) for name in sums[0]}
        self._counts = dict(states[0]["counts"])
