"""The Inception network that FID is defined by, from weights whose hash is checked; and a random stand-in for tests.

B batch, H W pixels, F = 2048 feature width. The blocks are torch-fidelity's (TensorFlow's graph of 2015-12-05 in
PyTorch); the file is read here, because torch-fidelity unpickles and torchmetrics looks at no hash.
"""

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import NamedTemporaryFile
from urllib.request import urlopen

import torch
from torch import Tensor, nn

from fluxflow_train import rng
from fluxflow_train.errors import UserError
from fluxflow_train.metrics.extractor import Extractor, state_sha256
from fluxflow_train.metrics.resize import check_resizer, resize
from fluxflow_train.pixels import quantize

NAME = "inception-v3-compat"
SIDE = 299
DIMENSION = 2048
FILE = "weights-inception-2015-12-05-6726825d.pth"
CANONICAL_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
TIMEOUT_SECONDS = 30
CLASSIFIER = "fc."
CALIBRATION_IMAGES = 8


class InceptionFeatures(Extractor):
    """uint8 images to the 2048 pooled features before the classifier, of any weights of that network."""

    name = NAME
    num_features = DIMENSION

    def __init__(self, network: nn.Module, resizer: str, weights_name: str | None, weights_sha256: str) -> None:
        super().__init__()
        check_resizer(resizer)
        self.resizer = resizer
        self.weights_name = weights_name
        self.weights_sha256 = weights_sha256
        self.is_random = weights_name is None
        self.is_canonical = weights_sha256 == CANONICAL_SHA256
        # channels_last is 1.6 times faster on a CPU.
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def features(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to fp32 (B, 2048)."""
        return self.network(normalized(resize(image, SIDE, self.resizer))).flatten(1)


class Inception(InceptionFeatures):
    """Weights from a file: the one given; else torch-hub's copy, which is downloaded first where it is not there yet.

    A Frechet distance of its features is an FID only with the canonical file, of which `is_canonical` tells.

    Raises:
        UserError: no such file and no network; another file than the canonical one, unless `allow_other_weights`; or a
            file that is damaged, of another network, or holds more than tensors (nothing is ever unpickled).
    """

    def __init__(
        self, weights: Path | str | None = None, resizer: str = "tf1", allow_other_weights: bool = False
    ) -> None:
        check_resizer(resizer)
        path = canonical_file() if weights is None else Path(weights)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"no Inception weights at {path} ({error.strerror}): download {URL} and give its path"
            ) from error
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != CANONICAL_SHA256 and not allow_other_weights:
            raise UserError(
                f"{path} is not {FILE}, by which FID is defined (sha256 {sha256[:8]}..., not {CANONICAL_SHA256[:8]}...)"
                f": fetch {URL} again, or set allow_other_weights=true, and no result will be called FID"
            )
        super().__init__(with_weights(read(data, path), path), resizer, path.name, sha256)


def calibrated_random_inception(seed: int, resizer: str = "tf1") -> InceptionFeatures:
    """Random weights for tests and smoke runs, whose features differ between images as trained ones do.

    Kaiming's normal draw for the convolutions (He et al. 2015, "Delving deep into rectifiers", eq. 10), then one batch
    sets the statistics of every BatchNorm; left at 0 and 1, features vanish (1e-8). BatchNorm's scale of 1/2 and shift
    of 1 let most activations pass the ReLU: at 1 and 0 a hundred layers make 1e-4 of fp32's rounding. The hash is of
    what was drawn: the statistics follow from it, but for rounding.
    """
    drawn: dict[str, Tensor] = {}
    network = layers().to_empty(device="cpu")
    for index, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            noise = rng.normal(seed, "random inception", [(index,)], tuple(module.weight.shape))[0]
            drawn[f"{name}.weight"] = noise * (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.copy_(drawn[f"{name}.weight"])
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            nn.init.constant_(module.weight, 0.5)
            nn.init.constant_(module.bias, 1.0)
            module.momentum = None  # running statistics become the plain average of one batch
    with torch.no_grad():
        network.train()(normalized(calibration_images(seed)))
    return InceptionFeatures(network, resizer, None, state_sha256(drawn))


def calibration_images(seed: int) -> Tensor:
    """Uneven blotches of every size, uint8 (8, 3, 299, 299): noise at five scales, added."""
    x = torch.zeros(CALIBRATION_IMAGES, 3, SIDE, SIDE)
    for side in (1, 3, 9, 27, 81):
        indices = [(side, i) for i in range(CALIBRATION_IMAGES)]
        noise = rng.normal(seed, "inception calibration", indices, (3, side, side))
        x += 0.25 * nn.functional.interpolate(noise, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return quantize(x)


def normalized(image: Tensor) -> Tensor:
    """uint8 (B, 3, 299, 299) to fp32 in [-1, 1), channels_last, as TensorFlow's graph does it."""
    return image.float().sub(128).div(128).contiguous(memory_format=torch.channels_last)


def layers() -> nn.Sequential:
    """The network up to the pooling, (B, 3, 299, 299) to (B, 2048, 1, 1), on the meta device: without weights or draws.

    Source: Szegedy et al. 2016, "Rethinking the Inception architecture"; torch-fidelity's FeatureExtractorInceptionV3,
    whose names of layers these are, so that its weights fit.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as blocks

    conv = blocks.BasicConv2d
    with torch.device("meta"):
        named = {
            "Conv2d_1a_3x3": conv(3, 32, kernel_size=3, stride=2),
            "Conv2d_2a_3x3": conv(32, 32, kernel_size=3),
            "Conv2d_2b_3x3": conv(32, 64, kernel_size=3, padding=1),
            "MaxPool_1": nn.MaxPool2d(kernel_size=3, stride=2),
            "Conv2d_3b_1x1": conv(64, 80, kernel_size=1),
            "Conv2d_4a_3x3": conv(80, 192, kernel_size=3),
            "MaxPool_2": nn.MaxPool2d(kernel_size=3, stride=2),
            "Mixed_5b": blocks.InceptionA(192, pool_features=32),
            "Mixed_5c": blocks.InceptionA(256, pool_features=64),
            "Mixed_5d": blocks.InceptionA(288, pool_features=64),
            "Mixed_6a": blocks.InceptionB(288),
            "Mixed_6b": blocks.InceptionC(768, channels_7x7=128),
            "Mixed_6c": blocks.InceptionC(768, channels_7x7=160),
            "Mixed_6d": blocks.InceptionC(768, channels_7x7=160),
            "Mixed_6e": blocks.InceptionC(768, channels_7x7=192),
            "Mixed_7a": blocks.InceptionD(768),
            "Mixed_7b": blocks.InceptionE_1(1280),
            "Mixed_7c": blocks.InceptionE_2(2048),
            "AvgPool": nn.AdaptiveAvgPool2d(1),
        }
    return nn.Sequential(OrderedDict(named))


def read(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict saved with torch.save. Raises UserError where it is damaged or holds more."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or holds more than tensors: fetch {URL} again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: fetch {URL} again")
    return dict(state)


def with_weights(state: dict[str, Tensor], path: Path) -> nn.Sequential:
    """The network with a state dict's tensors, in fp32; the classifier's are left out."""
    network = layers()
    try:
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith(CLASSIFIER)}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} holds the weights of another network: fetch {URL} again") from error
    return network.float()


def canonical_file() -> Path:
    """Torch-hub's copy of the canonical file, downloaded where it is not there yet.

    Raises:
        UserError: it can't be downloaded, or something else came.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        download(URL, path, CANONICAL_SHA256)
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Whole or not at all; several ranks may do so at once. Raises UserError where the file can't be had."""
    remedy = f"download {URL} on a machine with network and put it there, or give its path"
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            data = answer.read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"no Inception weights at {path}, and none came from the network ({error}): {remedy}"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"what came from {url} is not the Inception weights (a proxy's page?): {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"the Inception weights can't be kept at {path} ({error.strerror}): {remedy}") from error
