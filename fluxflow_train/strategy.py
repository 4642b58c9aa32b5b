"""Data parallel training of a task with several optimizers."""

from lightning.pytorch.strategies import DDPStrategy

from fluxflow_train import ranks


class NetwiseDDP(DDPStrategy):
    """A DistributedDataParallel of its own for each net of the task, instead of one around the LightningModule.

    One around all would wait, in each backward, for the gradients of the nets whose turn it is not:
    `find_unused_parameters` then walks the graph at every step and moves those nets' bytes as well.
    """

    def configure_ddp(self) -> None:
        task = self.lightning_module
        assert task is not None
        task.parallelize(self._setup_model)  # type: ignore[operator]

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or ranks.backend()
