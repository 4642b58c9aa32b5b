"""Pictures during training: the same held-out images through the averaged weights, always with eps = 0."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.files import replacing
from fluxflow_train.pixels import dequantize, quantize


class ReconstructionGrid(L.Callback):
    """Writes `images_000012800.png`: a column for each image, rows input, reconstruction, |difference|.

    The difference is 4 times amplified, on black.
    """

    def __init__(self, folder: str, every_images: int, num_images: int):
        self.folder, self.every_images, self.num_images = Path(folder), every_images, num_images
        self.drawn_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        num_images = min(self.num_images, data.num_samples("tune"))
        chosen = rng.generator(data.seed, "sample-grid").permutation(data.num_samples("tune"))[:num_images]
        self.images = data.images("tune", chosen.tolist())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        seen: int = pl_module.images_seen
        if seen // self.every_images > self.drawn_at // self.every_images:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.images_seen > self.drawn_at:
            self.draw(trainer, pl_module)

    @torch.no_grad()
    def draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.drawn_at = pl_module.images_seen
        average = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        x = dequantize(self.images.to(pl_module.device)).to(pl_module.dtype)
        vae: Any = pl_module.vae
        with average.averaged(pl_module), torch.autocast(x.device.type, enabled=False):
            x_hat = vae(x, x.new_zeros(len(x), *vae.latent_shape(*x.shape[-2:]))).x_hat
        if not trainer.is_global_zero:  # a sharded model has no forward on one rank alone
            return
        grid = picture(self.images, quantize(x_hat).cpu())
        with replacing(self.folder / f"images_{self.drawn_at:09d}.png") as temporary:
            grid.save(temporary, format="PNG")

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_at": self.drawn_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn_at = state_dict["drawn_at"]


def picture(image: Tensor, reconstruction: Tensor, margin: int = 2, scale: int = 2) -> Image.Image:
    """uint8 (B, 3, H, W), twice, to the grid, each pixel `scale` pixels wide."""
    difference = (image.int() - reconstruction.int()).abs().mul(4).clamp(max=255).byte()
    rows = torch.stack([image, reconstruction, difference])
    rows = torch.nn.functional.pad(rows, (0, margin, 0, margin), value=128)
    _, columns, _, h, w = rows.shape
    pixels = rows.permute(0, 3, 1, 4, 2).reshape(3 * h, columns * w, 3)
    return Image.fromarray(pixels.numpy()).resize((columns * w * scale, 3 * h * scale), Image.Resampling.NEAREST)
