"""LPIPS as a loss, from weights on this machine alone: nothing is downloaded in the middle of a job."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from torch import Tensor, nn

from fluxflow_train.errors import UserError

CHECKPOINTS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


class LPIPS(nn.Module):
    """`forward(x_hat, x)`: (B, 3, H, W) in about [-1, 1], to the mean distance, a scalar; frozen, in fp32.

    The network and its linear heads are torchmetrics'; the backbone is torchvision's state dict, a file of the user's.
    Keep it out of a task's module tree: a frozen network has no place in a checkpoint.
    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", eq. 1.

    Raises:
        UserError: torchvision or the file is missing, or the file holds something else.
    """

    def __init__(self, backbone_weights: str, net: Literal["vgg", "alex", "squeeze"] = "vgg") -> None:
        super().__init__()
        try:
            import torchvision  # noqa: F401  (torchmetrics builds the backbone with it)
        except ImportError as error:
            raise UserError("LPIPS needs torchvision: pip install torchvision, or set task.perceptual=null") from error
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        state = read(Path(backbone_weights), net)
        with torch.random.fork_rng(devices=[]):  # its random start, soon overwritten, must not shift anyone's draws
            self.network = _NoTrainLpips(net=net, pnet_rand=True)
        names = {name: torchvision_name(name) for name in self.network.net.state_dict()}
        if set(names.values()) != {name for name in state if name.startswith("features.")}:
            raise UserError(f"{backbone_weights} is no state dict of torchvision's {net}: {remedy(net)}")
        self.network.net.load_state_dict({name: state[source] for name, source in names.items()})
        self.requires_grad_(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x_hat.float(), x.float()).mean()


def read(path: Path, net: str) -> dict[str, Tensor]:
    """A torchvision state dict, classifier included."""
    if not path.is_file():
        raise UserError(f"no LPIPS backbone at {path}: {remedy(net)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is damaged or holds more than tensors: {remedy(net)}") from error


def remedy(net: str) -> str:
    return f"give torchvision's {CHECKPOINTS[net]} as task.perceptual.backbone_weights, or set task.perceptual=null"


def torchvision_name(name: str) -> str:
    """`slice2.5.weight` or `slices.1.5.weight` to `features.5.weight`."""
    return "features." + name.split(".", 2 if name.startswith("slices.") else 1)[-1]
