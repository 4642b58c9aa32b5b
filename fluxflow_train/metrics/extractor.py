"""What every feature extractor of ours is and promises: the same image gives the same features, wherever it runs.

B batch, H W pixels, F feature width.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fluxflow_train.generation import pinned_precision

# Twice as fast on a CPU as 64 at once, and 0.5 GB instead of 2.
PIECE = 16


class Extractor(nn.Module, ABC):
    """uint8 images to features: fp32, eval mode, outside autocast, in pieces, resizing itself.

    Keep it out of a task's module tree: a frozen network has no place in a checkpoint.
    """

    name: str
    num_features: int
    resizer: str
    weights_name: str | None
    weights_sha256: str
    is_random = False
    is_canonical = False  # only of these weights a Frechet distance is called FID

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W), B >= 1, to fp32 (B, F)."""

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to fp32 (B, F), also for B = 0.

        Raises:
            ValueError: other than uint8 (B, 3, H, W).
        """
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected uint8 (B, 3, H, W), got {image.dtype} {tuple(image.shape)}")
        if image.shape[0] == 0:
            return torch.zeros(0, self.num_features, device=image.device)
        with pinned_precision(image.device):
            return torch.cat([self.features(piece) for piece in image.split(PIECE)])

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in eval mode: batch statistics would make a feature depend on its batch."""
        return super().train(False)

    def fingerprint(self) -> list[float]:
        """Mean feature of 8 fixed images: tells another version or precision of the arithmetic apart."""
        device = next(chain(self.parameters(), self.buffers())).device
        return [round(v, 6) for v in self(fixed_images().to(device)).mean(1).tolist()]

    def describe(self) -> dict[str, Any]:
        """Everything that must agree before two distances are compared, as plain JSON."""
        return {
            "name": self.name,
            "class": type(self).__name__,
            "weights": self.weights_name,
            "weights_sha256": self.weights_sha256,
            "random": self.is_random,
            "canonical": self.is_canonical,
            "resizer": self.resizer,
            "dtype": "float32",
            "dimension": self.num_features,
            "fingerprint": self.fingerprint(),
        }


def fixed_images() -> Tensor:
    """8 images of noise, uint8 (8, 3, 64, 64), by Knuth's multiplicative hash: the same in any version of anything."""
    ramp = torch.arange(8 * 3 * 64 * 64)
    return ramp.mul(2654435761).bitwise_right_shift(13).bitwise_and(255).byte().view(8, 3, 64, 64)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes of all tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
