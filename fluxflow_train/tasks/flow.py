"""Training of the flow and its text projection on a frozen VAE's latents: wiring and logging, no mathematics.

Legend: B batch, D latent channels, h w latent grid, S text tokens, W backbone width.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxflow_train import rng
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.latent_data import LatentData
from fluxflow_train.errors import UserError
from fluxflow_train.generation import settings_of
from fluxflow_train.losses import at_least_fp32
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.models.vae import reparameterise
from fluxflow_train.pixels import dequantize
from fluxflow_train.tasks.budget import BudgetTask, OptimizerFactory, build_optimizer
from fluxflow_train.tasks.parts import mean, split
from fluxflow_train.weights import load_weights

QUARTERS = 4  # of the time axis, for the validation loss


class Noised(NamedTuple):
    """What the network is asked at: z, eps (B, D, h, w) and t (B,)."""

    z: Tensor
    eps: Tensor
    t: Tensor


class FlowTask(BudgetTask):
    """Mean squared error of the objective's prediction, captions dropped with `cfg_dropout_prob` sample by sample."""

    def __init__(
        self,
        model: TextToImage,
        vae: str,
        vae_sha256: str,
        objective: Any,
        cfg_dropout_prob: float,
        sampler: dict[str, Any],
        latents: Callable[..., LatentData] | None,
        optimizer: OptimizerFactory,
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
            vae: the run directory whose weights the model's VAE gets; they must have the hash `vae_sha256`.
            objective: see objectives.py.
            cfg_dropout_prob: the probability that a sample is trained with the null condition.
            sampler: solver, steps, guidance, micro_batch and resolution that the exported model recommends.
            latents: makes the data module of cached latents from that of images; None encodes images as they come.

        Raises:
            UserError: the VAE's weights are not to be had; the sampler can draw nothing; guidance by a null condition
                that is never trained.
        """
        super().__init__(
            budget_images, seed, lr_warmup, lr_final, clip_norm, log_every, max_bad_steps, num_micro_batches
        )
        if not 0 <= cfg_dropout_prob <= 1:
            raise ValueError(f"cfg_dropout_prob must be in [0, 1], got {cfg_dropout_prob}")
        if cfg_dropout_prob == 0 and sampler["guidance"] != 1:
            raise UserError(
                "task.cfg_dropout_prob=0 never trains the null condition, which guidance needs: "
                "add task.sampler.guidance=1, or leave some captions out"
            )
        settings = settings_of(sampler, seed)  # what can't be drawn is refused before anything is trained
        objective.scheduler(settings.solver, settings.steps)
        load_weights(model.vae, vae, vae_sha256)
        # Kept out of the module tree: a frozen network has no place in a checkpoint.
        self.model: TextToImage
        object.__setattr__(self, "model", model)
        self.text, self.flow = model.text, model.flow
        self.vae_sha256 = vae_sha256
        self.objective = objective
        self.cfg_dropout_prob = cfg_dropout_prob
        self.sampler = dict(sampler)
        self.latents = latents
        self.optimizer = optimizer

    def data_module(self, images: ImageData) -> Any:
        """What trains this task, given the images: their latents and text from a cache, unless there is none."""
        if self.latents is None:
            return images
        backbone = self.text.backbone if self.text.backbone.frozen else None
        return self.latents(images=images, vae=self.model.vae, vae_sha256=self.vae_sha256, backbone=backbone)

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self, self.optimizer)

    def on_fit_start(self) -> None:
        self.model.to(self.device)
        super().on_fit_start()

    def trained_nets(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def ema_modules(self) -> dict[str, nn.Module]:
        """The nets whose average is validated and exported."""
        return {"text": self.text, "flow": self.flow}

    @property
    def exported(self) -> TextToImage:
        return self.model

    @property
    def stride(self) -> int:
        return self.model.vae.stride  # type: ignore[return-value]

    def before_export(self, images: ImageData) -> None:
        """Nothing is left to measure."""

    def description(self) -> dict[str, Any]:
        """What `model.json` must say of the model."""
        target = f"{type(self.objective).__module__}.{type(self.objective).__qualname__}"
        return {
            "objective": {"_target_": target, **asdict(self.objective)},
            "sampler": self.sampler,
            "cfg_dropout_prob": self.cfg_dropout_prob,
            "vae_sha256": self.vae_sha256,
            "text_fingerprint": self.text.backbone.fingerprint,
        }

    # ---- training ----

    def training_step(self, batch: dict, batch_idx: int) -> None:
        num_images = len(batch["index"]) * self.trainer.world_size
        optimizer: Any = self.optimizers()
        self.set_learning_rate([optimizer], num_images)
        parts = split(batch, self.num_micro_batches)
        logs = []
        for number, part in enumerate(parts, 1):
            dropped = self.dropped(part)
            with self.reducing(number == len(parts)):
                loss = self.losses(part, self.noised(part), dropped).mean()
                self.accumulate(loss)
            logs.append({"loss": loss.detach(), "dropped": dropped.float().mean()})
        means = mean(logs)
        means["grad_norm"] = self.step(optimizer, self, batch["key"])
        self.count_batch(num_images, optimizer.param_groups[0]["lr"], means)

    def noised(self, batch: dict) -> Noised:
        """Latent, noise and time of each sample by its own streams: the same on any number of ranks and workers."""
        mean, logvar = (t.to(self.dtype) for t in self.posterior(batch))
        z = reparameterise(mean, logvar, self.normal(batch, "posterior", mean))
        return Noised(z, self.normal(batch, "eps", z), self.objective.times(self.draws(batch, "time", 2)))

    def dropped(self, batch: dict) -> Tensor:
        """(B,) bool: the samples that are trained with the null condition."""
        return self.draws(batch, "cfg-dropout", 1)[:, 0] < self.cfg_dropout_prob

    def posterior(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the standardised latents, each (B, D, h, w)."""
        if "latent_mean" in batch:
            return batch["latent_mean"], batch["latent_logvar"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.model.vae.posterior(dequantize(batch["image"]))  # type: ignore[operator]

    def hidden(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Backbone states (B, S, W) and mask (B, S), from the cache where they are in it."""
        if "text_hidden" in batch:
            return batch["text_hidden"], batch["text_mask"]
        if self.text.backbone.frozen:
            return self.text.backbone.encode(batch["caption"])
        ids, mask = self.text.backbone.tokenize(batch["caption"])
        return self.text.backbone(ids, mask), mask

    def losses(self, batch: dict, noised: Noised, dropped: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,), in fp32."""
        z_t = self.objective.interpolate(noised.z, noised.eps, noised.t)
        hidden, mask = self.hidden(batch)
        prediction = self.net("model")(z_t, noised.t, hidden.to(self.dtype), mask, dropped)
        error = at_least_fp32(prediction) - self.objective.target(noised.z, noised.eps, noised.t)
        return error.square().flatten(1).mean(1)

    def normal(self, batch: dict, purpose: str, like: Tensor) -> Tensor:
        """Standard normal noise of each sample's own stream, in the shape of `like`."""
        return rng.normal(self.seed, purpose, samples(batch), tuple(like.shape[1:])).to(like)

    def draws(self, batch: dict, purpose: str, count: int) -> Tensor:
        """`count` uniform draws in [0, 1) of each sample's own stream: (B, count)."""
        values = [rng.generator(self.seed, purpose, *index).random(count) for index in samples(batch)]
        return torch.from_numpy(np.stack(values)).float().clamp(max=1 - 2**-24).to(self.device).to(self.dtype)

    # ---- validation (on averaged weights: the EMA callback swaps them in) ----

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.sums = torch.zeros(2, QUARTERS, dtype=torch.float64)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        count = data.num_samples("tune")
        # Each sample has a stratum of its own, so that the loss is an integral over t and the same at every validation.
        order = rng.generator(self.seed, "val-time").permutation(count)
        self.val_times = torch.from_numpy((order + 0.5) / count).float()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        mean = self.posterior(batch)[0].to(self.dtype)
        t = self.val_times.to(mean)[batch["index"]]
        noised = Noised(mean, self.normal(batch, "val-eps", mean), t)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.losses(batch, noised, torch.zeros_like(t, dtype=torch.bool))
        quarter = (t * QUARTERS).long().cpu()
        self.sums[0].index_add_(0, quarter, loss.double().cpu())
        self.sums[1].index_add_(0, quarter, torch.ones_like(quarter, dtype=torch.float64))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        sums, counts = self.trainer.strategy.reduce(self.sums.to(self.device), reduce_op="sum")
        values = {"val/loss": (sums.sum() / counts.sum()).item()}
        quarters = (sums / counts).tolist()
        values |= {f"val/loss_t{i}": quarter for i, quarter in enumerate(quarters) if counts[i]}
        self.record(values)
        super().on_validation_epoch_end()


def samples(batch: dict) -> list[tuple[int, int]]:
    """(epoch, sample) of each image of the batch."""
    return list(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True))
