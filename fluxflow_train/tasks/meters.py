"""Means of logged scalars over the images between two records, kept on the device until they are read."""

import torch
from torch import Tensor


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

    def state_dict(self) -> dict:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
