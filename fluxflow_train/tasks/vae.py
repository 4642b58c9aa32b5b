"""Training of a VAE, alone or against a patch discriminator: wiring and logging, no mathematics.

Legend: B batch, H W pixels, D latent channels, h w latent grid.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train import losses, ranks, rng, schedule
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.metrics import reconstruction as metrics
from fluxflow_train.models.vae import VAEOutput
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.tasks.budget import BudgetTask, OptimizerFactory, build_optimizer
from fluxflow_train.tasks.parts import mean, split


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


class Passed(NamedTuple):
    """A part of a batch behind the nets; what hasn't begun yet is None."""

    x: Tensor
    out: VAEOutput
    rec: Tensor  # reconstruction + weighted perceptual loss
    channel_kl: Tensor  # (D,)
    logs: dict[str, Tensor]
    logits_fake: Tensor | None = None
    pull: Tensor | None = None  # its gradient at the VAE is that of the generator's loss


class WholeBatch(NamedTuple):
    """What the global batch decides together, over ranks and parts."""

    charged: Tensor  # (D,) bool: the channels whose KL is above the free bits
    gan_weight: Tensor | None  # of the generator's loss, with the adaptive ratio


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
        num_micro_batches: int = 1,
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
        super().__init__(
            budget_images, seed, lr_warmup, lr_final, clip_norm, log_every, max_bad_steps, num_micro_batches
        )
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
        factories = [self.optimizer] if self.adversary is None else [self.optimizer, self.adversary.optimizer]
        return [build_optimizer(net, build) for net, build in zip(self.trained_nets().values(), factories, strict=True)]

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        super().on_fit_start()

    def trained_nets(self) -> dict[str, nn.Module]:
        return {"vae": self.vae} | ({} if self.discriminator is None else {"discriminator": self.discriminator})

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
        num_images = len(batch["index"]) * self.trainer.world_size
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.set_learning_rate(optimizers, num_images)
        parts = split(batch, self.num_micro_batches)
        kept = self.passed(parts[0]) if len(parts) == 1 else None
        with self.reducing(False):
            whole = self.whole_batch([kept] if kept else (self.passed(part) for part in parts))

        logs = []
        for number, part in enumerate(parts, 1):
            with self.reducing(number == len(parts)):
                passed = kept or self.passed(part)
                logs.append(self.backward_vae(passed, whole))
                if passed.logits_fake is not None:
                    logs[-1] |= self.backward_discriminator(passed.x, passed.logits_fake)
        means = mean(logs)
        means["grad_norm"] = self.step(optimizers[0], self.vae, batch["key"])
        if self.trains_discriminator:
            disc: Any = self.discriminator
            means["grad_norm_disc"] = self.step(optimizers[1], disc, batch["key"])
        self.count_batch(num_images, optimizers[0].param_groups[0]["lr"], means)

    @property
    def trains_discriminator(self) -> bool:
        return self.adversary is not None and self.progress >= self.adversary.disc_start

    @property
    def has_pull(self) -> bool:
        """Whether the discriminator's gradient reaches the VAE."""
        return self.adversary is not None and self.progress >= self.adversary.gan_start

    def noise(self, batch: dict, x: Tensor, purpose: str) -> Tensor:
        """The samples' own eps, (B, D, h, w): the same on any number of ranks and workers."""
        indices = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        return rng.normal(self.seed, purpose, indices, self.vae.latent_shape(*x.shape[-2:])).to(x.device)

    def passed(self, part: dict) -> Passed:
        """Forward through the VAE and, where it trains, the discriminator."""
        x = dequantize(part["image"]).to(self.dtype)
        out = self.net("vae")(x, self.noise(part, x, "eps"))
        rec = self.reconstruction(out.x_hat, x)
        logs = {"loss_rec": rec.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual(out.x_hat, x)
            logs["loss_perceptual"] = perceptual.detach()
            rec = rec + self.perceptual_weight * perceptual
        passed = Passed(x, out, rec, losses.kl_per_channel(out.mu, out.logvar), logs)
        if not self.trains_discriminator:
            return passed
        # D(x_hat) is computed once: its gradient at x_hat moves the VAE, its logits are D's own loss.
        fake = out.x_hat.detach().contiguous(memory_format=torch.channels_last).requires_grad_(self.has_pull)
        logits_fake = self.net("discriminator")(fake)
        if not self.has_pull:
            return passed._replace(logits_fake=logits_fake)
        loss_gan = losses.hinge_generator_loss(logits_fake)
        (at_image,) = torch.autograd.grad(loss_gan, fake, retain_graph=True)
        logs["loss_gan"] = loss_gan.detach()
        pull = (out.x_hat * at_image).sum()  # has the gradient of loss_gan, without a second pass through D
        return passed._replace(logits_fake=logits_fake, pull=pull)

    def whole_batch(self, parts: Iterable[Passed]) -> WholeBatch:
        """What isn't linear in the batch, from all its parts on all ranks; where all is linear, none is looked at."""
        charged = torch.ones(self.vae.latent_channels, dtype=torch.bool, device=self.device)
        if not self.free_bits and not self.has_pull:
            return WholeBatch(charged, None)
        channel_kl, gradients = [], []
        for part in parts:
            channel_kl.append(part.channel_kl.detach())
            if part.pull is not None:
                gradients.append(torch.stack(losses.gradients_at(self.vae.last_layer, part.rec, part.pull)))
        if self.free_bits:
            charged = ranks.mean(torch.stack(channel_kl).mean(0)) > self.free_bits
        if not gradients:
            return WholeBatch(charged, None)
        assert self.adversary is not None
        rec, gan = losses.at_least_fp32(ranks.mean(torch.stack(gradients).mean(0)))
        ratio = losses.clamped_ratio(rec.norm(), gan.norm(), high=self.adversary.max_adaptive)
        return WholeBatch(charged, self.adversary.weight * ratio)

    def backward_vae(self, passed: Passed, whole: WholeBatch) -> dict[str, Tensor]:
        """Accumulate reconstruction + weighted KL (+ the discriminator's pull); the part's scalars."""
        kl_weight = self.kl_weight * schedule.linear_warmup(self.images_seen, self.kl_warmup * self.budget_images)
        loss = passed.rec + kl_weight * losses.free_bits(passed.channel_kl, self.free_bits, whole.charged)
        mu, logvar, x_hat = (t.detach() for t in (passed.out.mu, passed.out.logvar, passed.out.x_hat))
        logs = passed.logs | {
            "loss": loss.detach(),
            "loss_kl": passed.channel_kl.detach().mean(),
            "rate_nats": losses.rate_nats(mu, logvar).mean(),
            "psnr": losses.psnr(x_hat, passed.x).mean(),
        }
        if passed.pull is not None and whole.gan_weight is not None:
            logs["gan_weight"] = whole.gan_weight
            loss = loss + whole.gan_weight * passed.pull
        self.accumulate(loss)
        return logs

    def backward_discriminator(self, x: Tensor, logits_fake: Tensor) -> dict[str, Tensor]:
        """Accumulate the hinge loss, and R1 every `r1_every` batches; the part's scalars."""
        d: Any = self.adversary
        loss = losses.hinge_discriminator_loss(d.discriminator(x), logits_fake)
        logs = {"loss_disc": loss.detach()}
        if d.r1_gamma and self.batches_done % d.r1_every == 0:
            r1 = losses.r1_penalty(d.discriminator, x).mean()
            loss = loss + 0.5 * d.r1_gamma * d.r1_every * r1
            logs["loss_r1"] = r1.detach()
        self.accumulate(loss)
        return logs

    # ---- validation (on averaged weights: the EMA callback swaps them in) ----

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        image = batch["image"]
        x = dequantize(image).to(self.dtype)
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
