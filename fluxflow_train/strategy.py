"""Training of a task with several nets and optimizers on several ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from fluxflow_train import ranks
from fluxflow_train.errors import UserError
from fluxflow_train.models.text import TextEncoder
from fluxflow_train.sharding import all_whole, placed_like


class NetwiseDDP(DDPStrategy):
    """A DistributedDataParallel of its own for each net of the task, instead of one around the LightningModule.

    One around all would wait, in each backward, for the gradients of the nets whose turn it is not:
    `find_unused_parameters` then walks the graph at every step and moves those nets' bytes as well.
    """

    def configure_ddp(self) -> None:
        task: Any = self.lightning_module
        task.parallelize(self._setup_model)

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or ranks.backend()


class NetwiseFSDP(NetwiseDDP):
    """FSDP2: a rank keeps its part of the parameters, gradients and optimizer state, for a net that outgrows a card.

    The blocks of the net are gathered one after the other, when their turn comes, and let go of at once. Checkpoints
    hold whole tensors, so that any strategy and number of ranks goes on from them.
    """

    def configure_ddp(self) -> None:
        task: Any = self.lightning_module
        if len(task.trained_nets()) > 1:  # the adaptive weight asks for gradients at a parameter that is let go of
            raise UserError("trainer=fsdp trains one net: leave gan=patch out, or take trainer=ddp")
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))

        def shard(net: nn.Module) -> nn.Module:
            net = net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP wants it
            parts = [block for module in net.modules() if isinstance(module, nn.ModuleList) for block in module]
            if isinstance(net, TextEncoder) and not net.backbone.frozen:  # is called beside its encoder
                raise UserError("trainer=fsdp needs a frozen text backbone: take model/text=minilm or distilbert")
            for part in (*reversed(parts), net):  # what is inside first
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
            if isinstance(net, TextEncoder):
                for method in ("drop", "null"):  # use its parameters beside its forward
                    register_fsdp_forward_method(net, method)
            return net

        task.wrapped = {name: shard(net) for name, net in task.ema_modules().items()}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return all_whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return all_whole(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in state["state"].items():
                parameter = parameters[number]
                for name, value in values.items():
                    if value.shape == parameter.shape:
                        values[name] = placed_like(value, parameter)
            optimizer.load_state_dict(state)
