"""What every task shares: a clock of images, guarded updates, records, and the state that a resumed run needs."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fluxflow_train import ranks, rng, schedule
from fluxflow_train.tasks.guard import Guard
from fluxflow_train.tasks.meters import Meters

OptimizerFactory = Callable[..., Optimizer]


class BudgetTask(L.LightningModule):
    """`images_seen` is the clock: all that changes during training is a function of it and of `budget_images`."""

    def __init__(
        self,
        budget_images: int,
        seed: int,
        lr_warmup: float,
        lr_final: float,
        clip_norm: float,
        log_every: int,
        max_bad_steps: int,
        num_micro_batches: int = 1,
    ):
        """
        Args:
            num_micro_batches: how many parts a rank's share of each batch is passed through in, to save memory.
            lr_warmup: fraction of the budget; lr_final: last learning rate as a fraction of the first.
            log_every: images between records. max_bad_steps: steps with NaN or Inf that training survives.
        """
        super().__init__()
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches: got {num_micro_batches}, expected at least 1")
        self.num_micro_batches = num_micro_batches
        self.wrapped: dict[str, Any] = {}  # the trained nets as several ranks call them; outside the module tree
        self.automatic_optimization = False
        self.budget_images, self.seed = budget_images, seed
        self.lr_warmup, self.lr_final = lr_warmup, lr_final
        self.clip_norm, self.log_every = clip_norm, log_every
        self.guard = Guard(max_bad_steps)
        self.meters = Meters()
        self.images_seen = self.batches_done = 0
        self.latest: dict[str, float] = {}
        self.last_record = (0, 0.0)  # images and seconds of training
        self.seconds_training = self.clock = 0.0

    @property
    def progress(self) -> float:
        """Fraction of the budget seen before this batch."""
        return self.images_seen / self.budget_images

    # ---- updates ----

    def set_learning_rate(self, optimizers: Iterable[LightningOptimizer], num_images: int) -> None:
        factor = schedule.warmup_cosine(
            self.images_seen + num_images, self.budget_images, self.lr_warmup, self.lr_final
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Should a net draw from the global generator (dropout), a resumed run draws the same.
        torch.manual_seed(rng.torch_seed(self.seed, "step", self.batches_done, self.global_rank))

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of one part's mean loss to those of the batch.

        Those of a loss that is not finite are NaN, on all ranks once they are reduced, so that all leave the step out.
        """
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.manual_backward(loss * finite / self.num_micro_batches)

    def step(self, optimizer: LightningOptimizer, net: nn.Module, keys: list[str]) -> Tensor:
        """One guarded optimizer step of `net` with what was accumulated. Returns the gradient norm."""
        norm, found_inf = self.guard.step(net, optimizer.optimizer, self.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.guard.remember(found_inf, self.images_seen, keys)
        return norm.detach()

    def count_batch(self, num_images: int, lr: float, logs: dict[str, Tensor]) -> None:
        """Move the clock on, and record every `log_every` images."""
        before, self.images_seen = self.images_seen, self.images_seen + num_images
        self.batches_done += 1
        self.meters.add(logs)
        if before // self.log_every != self.images_seen // self.log_every or self.images_seen >= self.budget_images:
            self.record_training(lr)

    # ---- several ranks ----

    def trained_nets(self) -> dict[str, nn.Module]:
        """The nets that an optimizer steps, each with a forward that all its gradients come from."""
        raise NotImplementedError

    def net(self, name: str) -> Any:
        """A trained net as it must be called for its gradients to be those of all ranks."""
        return self.wrapped.get(name) or self.trained_nets()[name]

    def parallelize(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        self.wrapped = {name: wrap(net) for name, net in self.trained_nets().items()}

    @contextmanager
    def reducing(self, is_last: bool) -> Iterator[None]:
        """Gradients travel between ranks in the last backward of a batch, not in those before it."""
        for net in self.wrapped.values():
            if isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = is_last
            else:  # FSDP
                net.set_requires_gradient_sync(is_last)
        yield

    # ---- records ----

    def on_fit_start(self) -> None:
        self.clock = time.perf_counter()
        self.last_record = (self.images_seen, self.seconds_training)

    def record_training(self, lr: float) -> None:
        """Send the means since the last record to the loggers, and look for steps that were left out."""
        self.read_guard()
        self.count_time()
        means = self.meters.read()
        reduced = ranks.mean(torch.tensor(list(means.values()), dtype=torch.float64)).tolist()
        values = {f"train/{name}": mean for name, mean in zip(means, reduced, strict=True)}
        values |= {"train/lr": lr, "train/bad_steps": float(self.guard.num_bad_steps)}
        images, seconds = self.last_record
        values["train/images_per_second"] = (self.images_seen - images) / (self.seconds_training - seconds)
        self.last_record = (self.images_seen, self.seconds_training)
        self.record(values)

    def read_guard(self) -> None:
        """Write down the updates that were left out; too many end the run."""
        steps = self.guard.read()
        for step in steps:  # the same on all ranks
            step.keys = [key for share in ranks.gather(step.keys) for key in share]
        if steps and self.global_rank == 0:
            with (Path(self.trainer.default_root_dir) / "bad_steps.txt").open("a") as file:
                file.writelines(f"{step.images_seen}\t{' '.join(step.keys)}\n" for step in steps)
        self.guard.check(steps)

    def count_time(self) -> None:
        """Add what has passed since the clock was last looked at; validation looks at it without adding."""
        now = time.perf_counter()
        self.seconds_training += now - self.clock
        self.clock = now

    def record(self, values: dict[str, float]) -> None:
        """Send scalars to every logger, against the images seen."""
        self.latest |= values
        for logger in self.loggers:
            logger.log_metrics({"images_seen": float(self.images_seen), **values}, step=self.images_seen)

    def on_validation_epoch_start(self) -> None:
        self.count_time()

    def on_validation_epoch_end(self) -> None:
        self.clock = time.perf_counter()

    # ---- checkpoints ----

    def refuse_divergence(self) -> None:
        """Raises RuntimeError where ranks hold different weights: damaged hardware, or a gradient that stayed local."""
        weights = [p.detach() for net in self.trained_nets().values() for p in net.parameters() if p.requires_grad]
        if any(isinstance(weight, DTensor) for weight in weights):  # FSDP: each rank has its own part
            return
        bits = torch.stack([weight.flatten().view(torch.int16).sum() for weight in weights])
        digests = ranks.gather(hash(tuple(bits.tolist())))
        if len(set(digests)) > 1:
            raise RuntimeError(f"the ranks hold different weights at {self.images_seen:,} images: {digests}")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.read_guard()
        self.refuse_divergence()
        if self.trainer.training:
            self.count_time()
        checkpoint["task"] = {
            "images_seen": self.images_seen,
            "batches_done": self.batches_done,
            "seconds_training": self.seconds_training,
            "num_bad_steps": self.guard.num_bad_steps,
            "meters": ranks.gather(self.meters.state_dict()),
            "num_micro_batches": self.num_micro_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        state = checkpoint["task"]
        self.images_seen, self.batches_done = state["images_seen"], state["batches_done"]
        self.seconds_training = state["seconds_training"]
        self.guard.num_bad_steps = state["num_bad_steps"]
        self.meters.load_state_dict(state["meters"], self.global_rank)


def build_optimizer(net: nn.Module, build: OptimizerFactory) -> Optimizer:
    """The optimizer of `net`, each group remembering the learning rate that the schedule scales.

    Raises:
        ValueError: it is not fused.
    """
    optimizer = build(parameter_groups(net))
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(optimizer).__name__} must be fused, so that a step with NaN can be left out on the device: "
            "set optimizer.fused=true"
        )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def parameter_groups(net: nn.Module) -> list[dict]:
    """Weight decay on matrices and kernels only: a norm, a bias or a curve's points have no reason to be small."""
    decayed = {
        id(layer.weight) for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    }
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
