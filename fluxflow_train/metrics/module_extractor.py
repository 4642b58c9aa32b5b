"""Any torch module as a feature extractor, under a name of its own: DINOv2 and what comes next.

B batch, H W pixels, S side, F feature width.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxflow_train.errors import UserError
from fluxflow_train.generation import pinned_precision
from fluxflow_train.metrics.extractor import Extractor, fixed_images, state_sha256
from fluxflow_train.metrics.resize import check_resizer, resize


class ModuleExtractor(Extractor):
    """`module` maps fp32 (B, 3, S, S), normalised by `mean` and `std`, to float (B, F); it is frozen here.

    It comes on the CPU; `to` moves it later. Trained weights can't be told from a random start, so without
    `weights_sha256` (of its state dict in fp32, `state_sha256`) they count as random, and no report of them is final.

    Raises:
        UserError: a name that no metric can bear; no such resizer; not three values above 0 in `std`; other weights
            than `weights_sha256` says; a module that fails on that side; or an output that is not (B, F).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        name: str,
        side: int,
        resizer: str,
        mean: Sequence[float],
        std: Sequence[float],
        weights_sha256: str | None = None,
    ) -> None:
        """`mean` and `std` of the three channels, of pixels in [0, 1]."""
        super().__init__()
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
            raise UserError(f"the extractor's name {name!r} becomes a metric's: use a-z, 0-9, and '_', '.' or '-'")
        check_resizer(resizer)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(
                f"extractor {name}: give mean and std as three numbers each, std above 0; got {list(mean)}, {list(std)}"
            )
        self.name = name
        self.side = side
        self.resizer = resizer
        self.register_buffer("mean", torch.tensor([float(v) for v in mean]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([float(v) for v in std]).view(1, 3, 1, 1), persistent=False)
        self.module = module.float().requires_grad_(False)
        self.eval()
        self.weights_name = type(module).__name__
        self.weights_sha256 = state_sha256(module.state_dict())
        self.is_random = weights_sha256 is None
        if weights_sha256 not in (None, self.weights_sha256):
            raise UserError(
                f"extractor {name} has other weights than its weights_sha256 says: load the right ones, or set"
                f" weights_sha256={self.weights_sha256}"
            )
        self.num_features = self._width()

    def features(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to fp32 (B, F)."""
        return self._output(image).float()

    def _output(self, image: Tensor) -> Tensor:
        x = resize(image, self.side, self.resizer).float().div(255)
        return self.module((x - self.mean) / self.std)

    @torch.no_grad()
    def _width(self) -> int:
        """F, from two images."""
        try:
            with pinned_precision(torch.device("cpu")):
                output = self._output(fixed_images()[:2])
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"extractor {self.name} fails on an image of {self.side} x {self.side} ({reason}): change side, or the"
                " module"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"extractor {self.name} makes {shape} of 2 images where (2, F) is needed: wrap the module so that it"
                " returns one row of features for each image"
            )
        return output.shape[1]
