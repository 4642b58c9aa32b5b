"""What every task shares: a clock of images, guarded updates, records, and the state that a resumed run needs."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train import schedule
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
    ):
        """
        Args:
            lr_warmup: fraction of the budget; lr_final: last learning rate as a fraction of the first.
            log_every: images between records. max_bad_steps: steps with NaN or Inf that training survives.
        """
        super().__init__()
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

    def update(
        self, optimizer: LightningOptimizer, net: nn.Module, loss: Tensor, batch: dict, logs: dict, suffix: str = ""
    ) -> None:
        """One guarded optimizer step of `net`."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm, found_inf = self.guard.step(net, optimizer.optimizer, loss, self.clip_norm)
        optimizer.step()
        self.guard.remember(found_inf, self.images_seen, batch["key"])
        logs[f"grad_norm{suffix}"] = norm.detach()

    def count_batch(self, num_images: int, lr: float, logs: dict[str, Tensor]) -> None:
        """Move the clock on, and record every `log_every` images."""
        before, self.images_seen = self.images_seen, self.images_seen + num_images
        self.batches_done += 1
        self.meters.add(logs)
        if before // self.log_every != self.images_seen // self.log_every or self.images_seen >= self.budget_images:
            self.record_training(lr)

    # ---- records ----

    def on_fit_start(self) -> None:
        self.clock = time.perf_counter()
        self.last_record = (self.images_seen, self.seconds_training)

    def record_training(self, lr: float) -> None:
        """Send the means since the last record to the loggers, and look for steps that were left out."""
        self.read_guard()
        self.count_time()
        values = {f"train/{name}": mean for name, mean in self.meters.read().items()}
        values |= {"train/lr": lr, "train/bad_steps": float(self.guard.num_bad_steps)}
        images, seconds = self.last_record
        values["train/images_per_second"] = (self.images_seen - images) / (self.seconds_training - seconds)
        self.last_record = (self.images_seen, self.seconds_training)
        self.record(values)

    def read_guard(self) -> None:
        """Write down the updates that were left out; too many end the run."""
        steps = self.guard.read()
        if steps:
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

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.read_guard()
        if self.trainer.training:
            self.count_time()
        checkpoint["task"] = {
            "images_seen": self.images_seen,
            "batches_done": self.batches_done,
            "seconds_training": self.seconds_training,
            "num_bad_steps": self.guard.num_bad_steps,
            "meters": self.meters.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        state = checkpoint["task"]
        self.images_seen, self.batches_done = state["images_seen"], state["batches_done"]
        self.seconds_training = state["seconds_training"]
        self.guard.num_bad_steps = state["num_bad_steps"]
        self.meters.load_state_dict(state["meters"])


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
