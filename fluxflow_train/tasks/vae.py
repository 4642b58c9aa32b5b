"""Training of a VAE, alone or against a patch discriminator: wiring and logging, no mathematics.

Legend: B batch, H W pixels, D latent channels, h w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train import losses, rng, schedule
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.metrics import reconstruction as metrics
from fluxflow_train.models.vae import VAEOutput
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.tasks.budget import BudgetTask, OptimizerFactory, build_optimizer


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


class VAETask(BudgetTask):
    """Reconstruction + KL (+ perceptual) (+ GAN): one shared reconstruction, the VAE's update first, then D's.

    Learning rate, KL warm-up and GAN starts are functions of `images_seen` and `budget_images`.
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
        latent_statistics: Callable[[nn.Module, ImageData, torch.device], None] | None,
        adversary: Adversary | None = None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
    ):
        """
        Args:
            optimizer: builds a fused optimizer from parameter groups (its step takes a found-inf flag).
            reconstruction: (x_hat, x) -> scalar.
            kl_warmup: fraction of the budget.
            free_bits: nats per latent element below which a channel's KL costs nothing.
            latent_statistics: measures the trained VAE's latents before the export; None leaves them as they are.
            perceptual: frozen, (x_hat, x) -> scalar; not in checkpoints.
        """
        super().__init__(budget_images, seed, lr_warmup, lr_final, clip_norm, log_every, max_bad_steps)
        self.vae: Any = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adversary = adversary
        self.discriminator = adversary and adversary.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Kept out of the module tree: a frozen network has no place in a checkpoint.
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None
        object.__setattr__(self, "perceptual", perceptual)
        self.perceptual_weight = perceptual_weight
        self.optimizer = optimizer
        self.reconstruction = reconstruction
        self.latent_statistics = latent_statistics
        self.kl_weight, self.kl_warmup, self.free_bits = kl_weight, kl_warmup, free_bits

    # ---- optimizers ----

    def configure_optimizers(self) -> list[Optimizer]:
        factories = [(self.vae, self.optimizer)]
        if self.adversary is not None:
            factories.append((self.adversary.discriminator, self.adversary.optimizer))
        return [build_optimizer(net, build) for net, build in factories]

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        super().on_fit_start()

    def ema_modules(self) -> dict[str, nn.Module]:
        """The nets whose average is validated and exported."""
        return {"vae": self.vae}

    def data_module(self, images: ImageData) -> ImageData:
        """What trains this task, given the images: they themselves."""
        return images

    @property
    def exported(self) -> nn.Module:
        return self.vae

    @property
    def stride(self) -> int:
        return self.vae.stride

    def before_export(self, images: ImageData) -> None:
        """Measure the latents of the weights as they now are: a flow wants them standardised."""
        if self.latent_statistics is not None:
            self.latent_statistics(self.vae, images, self.device)

    def description(self) -> dict[str, Any]:
        """What `model.json` must say of the model."""
        return {
            "provenance": {
                "reconstruction": self.reconstruction.__name__,
                "perceptual": "none" if self.perceptual is None else type(self.perceptual).__name__,
                "gan": "none" if self.adversary is None else "patch",
                "kl_weight": self.kl_weight,
            },
        }

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

        self.count_batch(num_images, optimizers[0].param_groups[0]["lr"], logs)

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

    # ---- validation (on averaged weights: the EMA callback swaps them in) ----

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
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
        super().on_validation_epoch_end()
