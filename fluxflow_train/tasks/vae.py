"""Training of a VAE, alone or against a patch discriminator: wiring and logging, no mathematics.

Legend: B batch, H W pixels, D latent channels, h w latent grid.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train import losses, rng, schedule
from fluxflow_train.metrics import reconstruction as metrics
from fluxflow_train.models.vae import VAEOutput
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.tasks.guard import Guard
from fluxflow_train.tasks.meters import Meters

OptimizerFactory = Callable[..., Optimizer]


@dataclass(frozen=True)
class Adversary:
    """The discriminator and how it is brought in. Starts are fractions of the budget.

    D trains from `disc_start` on; its gradient reaches the VAE from `gan_start` on, weighted by `weight` times the
    adaptive ratio (clamped to [0, max_adaptive]). R1: `r1_gamma` (0 leaves it out) every `r1_every` batches.
    """

    discriminator: nn.Module
    optimizer: OptimizerFactory
    disc_start: float
    gan_start: float
    weight: float
    max_adaptive: float
    r1_gamma: float
    r1_every: int

    def __post_init__(self) -> None:
        if not 0 <= self.disc_start <= self.gan_start:
            raise ValueError(f"disc_start must be at most gan_start, got {self.disc_start} and {self.gan_start}")


class VAETask(L.LightningModule):
    """Reconstruction + KL (+ perceptual) (+ GAN): one shared reconstruction, the VAE's update first, then D's.

    `images_seen` is the clock: learning rate, KL warm-up and GAN starts are functions of it and of `budget_images`.
    """

    def __init__(
        self,
        vae: nn.Module,
        optimizer: OptimizerFactory,
        budget_images: int,
        seed: int,
        reconstruction: Callable[[Tensor, Tensor], Tensor],
        kl_weight: float,
        kl_warmup: float,
        free_bits: float,
        lr_warmup: float,
        lr_final: float,
        clip_norm: float,
        log_every: int,
        max_bad_steps: int,
        adversary: Adversary | None = None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
    ):
        """
        Args:
            optimizer: builds a fused optimizer from parameter groups (its step takes a found-inf flag).
            reconstruction: (x_hat, x) -> scalar.
            kl_warmup, lr_warmup: fractions of the budget; lr_final: last learning rate as a fraction of the first.
            free_bits: nats per latent element below which a channel's KL costs nothing.
            log_every: images between records. max_bad_steps: steps with NaN or Inf that training survives.
            perceptual: frozen, (x_hat, x) -> scalar; not in checkpoints.
        """
        super().__init__()
        self.automatic_optimization = False
        self.vae: Any = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adversary = adversary
        self.discriminator = adversary and adversary.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Kept out of the module tree: a frozen network has no place in a checkpoint.
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None
        object.__setattr__(self, "perceptual", perceptual)
        self.perceptual_weight = perceptual_weight
        self.optimizer = optimizer
        self.budget_images, self.seed = budget_images, seed
        self.reconstruction = reconstruction
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits
        self.lr_warmup, self.lr_final = lr_warmup, lr_final
        self.clip_norm, self.log_every = clip_norm, log_every
        self.guard = Guard(max_bad_steps)
        self.meters = Meters()
        self.images_seen = self.batches_done = 0
        self.latest: dict[str, float] = {}
        self.last_record = (0, 0.0)  # images and seconds of training
        self.seconds_training = self.clock = 0.0

    # ---- optimizers ----

    def configure_optimizers(self) -> list[Optimizer]:
        factories = [(self.vae, self.optimizer)]
        if self.adversary is not None:
            factories.append((self.adversary.discriminator, self.adversary.optimizer))
        optimizers = [build(parameter_groups(net)) for net, build in factories]
        for optimizer in optimizers:
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ValueError(
                    f"{type(optimizer).__name__} must be fused, so that a step with NaN can be left out on the device: "
                    "set optimizer.fused=true"
                )
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
        return optimizers

    def set_learning_rate(self, optimizers: Iterable[LightningOptimizer], num_images: int) -> None:
        factor = schedule.warmup_cosine(
            self.images_seen + num_images, self.budget_images, self.lr_warmup, self.lr_final
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        self.clock = time.perf_counter()
        self.last_record = (self.images_seen, self.seconds_training)

    def ema_modules(self) -> dict[str, nn.Module]:
        """The nets whose average is validated and exported."""
        return {"vae": self.vae}

    # ---- training ----

    def training_step(self, batch: dict, batch_idx: int) -> None:
        x = dequantize(batch["image"])
        num_images = len(x) * self.trainer.world_size
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.set_learning_rate(optimizers, num_images)
        logs: dict[str, Tensor] = {}

        out = self.vae(x, self.noise(batch, x, "eps"))
        rec, rest = self.vae_losses(x, out, logs)
        if self.adversary is None or self.progress < self.adversary.disc_start:
            self.update(optimizers[0], self.vae, rec + rest, batch, logs)
        else:
            # D(x_hat) is computed once: its gradient at x_hat moves the VAE, its logits are D's own loss.
            has_pull = self.progress >= self.adversary.gan_start
            fake = out.x_hat.detach().contiguous(memory_format=torch.channels_last).requires_grad_(has_pull)
            logits_fake = self.adversary.discriminator(fake)
            pull = self.gan_pull(rec, out.x_hat, fake, logits_fake, logs) if has_pull else rec.new_zeros(())
            self.update(optimizers[0], self.vae, rec + rest + pull, batch, logs)
            loss_disc = self.discriminator_loss(x, logits_fake, logs)
            self.update(optimizers[1], self.adversary.discriminator, loss_disc, batch, logs, suffix="_disc")

        before, self.images_seen = self.images_seen, self.images_seen + num_images
        self.batches_done += 1
        self.meters.add(logs)
        if before // self.log_every != self.images_seen // self.log_every or self.images_seen >= self.budget_images:
            self.record_training(optimizers[0].param_groups[0]["lr"])

    @property
    def progress(self) -> float:
        """Fraction of the budget seen before this batch."""
        return self.images_seen / self.budget_images

    def noise(self, batch: dict, x: Tensor, purpose: str) -> Tensor:
        """The samples' own eps, (B, D, h, w): the same on any number of ranks and workers."""
        indices = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        return rng.normal(self.seed, purpose, indices, self.vae.latent_shape(*x.shape[-2:])).to(x.device)

    def vae_losses(self, x: Tensor, out: VAEOutput, logs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(reconstruction + perceptual, weighted KL): two scalars."""
        rec = self.reconstruction(out.x_hat, x)
        logs["loss_rec"] = rec.detach()
        if self.perceptual is not None:
            perceptual = self.perceptual(out.x_hat, x)
            logs["loss_perceptual"] = perceptual.detach()
            rec = rec + self.perceptual_weight * perceptual
        channel_kl = losses.kl_per_channel(out.mu, out.logvar)
        kl_weight = self.kl_weight * schedule.linear_warmup(self.images_seen, self.kl_warmup * self.budget_images)
        kl = kl_weight * losses.free_bits(channel_kl, self.free_bits)
        logs["loss"] = (rec + kl).detach()
        logs["loss_kl"] = channel_kl.detach().mean()
        logs["rate_nats"] = losses.rate_nats(out.mu.detach(), out.logvar.detach()).mean()
        logs["psnr"] = losses.psnr(out.x_hat.detach(), x).mean()
        return rec, kl

    def gan_pull(
        self, rec: Tensor, x_hat: Tensor, fake: Tensor, logits_fake: Tensor, logs: dict[str, Tensor]
    ) -> Tensor:
        """A scalar with the gradient of the weighted generator loss, without a second pass through D."""
        assert self.adversary is not None
        loss_gan = losses.hinge_generator_loss(logits_fake)
        (at_image,) = torch.autograd.grad(loss_gan, fake, retain_graph=True)
        pull = (x_hat * at_image).sum()
        ratio = losses.adaptive_weight(rec, pull, self.vae.last_layer, high=self.adversary.max_adaptive)
        logs["loss_gan"], logs["gan_weight"] = loss_gan.detach(), self.adversary.weight * ratio
        return self.adversary.weight * ratio * pull

    def discriminator_loss(self, x: Tensor, logits_fake: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """Hinge loss, and R1 every `r1_every` batches: a scalar."""
        assert self.adversary is not None
        d = self.adversary
        loss = losses.hinge_discriminator_loss(d.discriminator(x), logits_fake)
        logs["loss_disc"] = loss.detach()
        if d.r1_gamma and self.batches_done % d.r1_every == 0:
            r1 = losses.r1_penalty(d.discriminator, x).mean()
            loss = loss + 0.5 * d.r1_gamma * d.r1_every * r1
            logs["loss_r1"] = r1.detach()
        return loss

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

    # ---- validation (on averaged weights: the EMA callback swaps them in) ----

    def on_validation_epoch_start(self) -> None:
        self.count_time()
        self.sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        image = batch["image"]
        x = dequantize(image)
        with torch.autocast(self.device.type, enabled=False):
            out = self.vae(x, x.new_zeros(len(x), *self.vae.latent_shape(*x.shape[-2:])))
        values = [
            metrics.psnr(image, quantize(out.x_hat)),
            metrics.ssim(image, quantize(out.x_hat)),
            losses.rate_nats(out.mu, out.logvar).double(),
        ]
        self.sums += torch.stack([*(v.sum().cpu() for v in values), torch.tensor(len(x)).double()])

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        sums = self.trainer.strategy.reduce(self.sums.to(self.device), reduce_op="sum")
        psnr, ssim, rate = (sums[:3] / sums[3]).tolist()
        self.record({"val/psnr": psnr, "val/ssim": ssim, "val/rate_nats": rate})
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
