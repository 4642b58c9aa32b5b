"""Means of logged scalars over the images between two records, kept on the device until they are read.

Each rank keeps those of its own share of the batches; a task averages what it reads over the ranks.
"""

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fluxflow_train import ranks


class Meters:
    """Running means by name; each name is averaged over the steps that logged it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means since the last reading; waits for the device once."""
        if not self._sums:
            return {}
        device = list(self._sums.values())[-1].device  # sums that a checkpoint brought may still be on the CPU
        sums = torch.stack([total.to(device) for total in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {"sums": {name: total.item() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """From the states of all ranks that there were; with fewer or more of them now, each gets their mean."""
        sums = [state["sums"] for state in states]
        mine = (
            sums[rank] if rank < len(sums) == ranks.world_size() else {n: mean([s[n] for s in sums]) for n in sums[0]}
        )
        self._sums = {name: torch.tensor(total) for name, total in mine.items()}
        self._counts = dict(states[0]["counts"])
