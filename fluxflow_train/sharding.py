"""Tensors of which each rank holds a part (FSDP), and the same tensors whole."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all ranks where it is sharded: then all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_whole(tree: Any) -> Any:
    """Every tensor of a nested structure, whole and on the CPU where it was sharded."""
    return tree_map(lambda leaf: leaf.full_tensor().cpu() if isinstance(leaf, DTensor) else leaf, tree)


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as `parameter` of the same shape is: on its device, and sharded as it is."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)
