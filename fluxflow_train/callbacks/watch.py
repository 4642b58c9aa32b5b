"""Forward hooks on the activations of the trained nets for one batch, and the gradients of what feeds them.

B batch, C channels, L tokens. What is seen stays on the device; nothing is changed and no generator is asked.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxflow_train.losses import at_least_fp32
from fluxflow_train.models.activations import GatedActivation, gate5
from fluxflow_train.models.bezier import BezierActivation, TrainableBezier
from fluxflow_train.models.bezier_curve import pre_activate, widen
from fluxflow_train.models.flow import PillarCurve
from fluxflow_train.models.text import Backbone, TextEncoder

ACTIVATIONS = (GatedActivation, BezierActivation, TrainableBezier, PillarCurve)
FLAT = {"sigmoid": (0.01, 0.99), "tanh": (-0.98, 0.98)}  # beyond: less than 4 % of the largest slope
MAX_SAMPLES = 20_000  # elements of a layer that its density is made of
MAX_DENSITIES = 8


@dataclass
class Layer:
    """What one activation did in one batch; tensors stay on the device."""

    module: nn.Module
    feeding: list[nn.Parameter]
    channels: int = 0
    shares: tuple[str, ...] = ()
    counts: list[int] = field(default_factory=list)  # positions of each call
    calls: list[Tensor] = field(default_factory=list)  # mean and variance of each channel, then the shares
    sample: tuple[Tensor, Tensor] | None = None  # t and the output
    grad_norm: Tensor | None = None


class Watch:
    """Forward hooks on every activation, and on every module with parameters of its own, until `remove`."""

    def __init__(self, nets: dict[str, nn.Module], with_samples: bool):
        self.layers: dict[str, Layer] = {}  # in the order in which they ran
        self.waiting: list[nn.Parameter] = []  # ran, and no activation yet
        self.known: set[nn.Parameter] = set()
        self.mask: Tensor | None = None  # of the text tokens that now pass
        modules = {name: m for net, top in nets.items() for name, m in top.named_modules(prefix=net)}
        curves = [name for name, m in modules.items() if isinstance(m, BezierActivation | PillarCurve)]
        chosen = np.linspace(0, len(curves) - 1, min(len(curves), MAX_DENSITIES)).round().astype(int)
        self.sampled = {curves[i] for i in chosen}
        self.sampled |= {name for name, m in modules.items() if isinstance(m, TrainableBezier)}
        if not with_samples:
            self.sampled.clear()
        self.handles = []
        for name, module in modules.items():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                self.handles.append(module.register_forward_pre_hook(partial(self.before, own)))
            if isinstance(module, TextEncoder | Backbone):
                self.handles.append(module.register_forward_pre_hook(self.enter_text))
                self.handles.append(module.register_forward_hook(self.leave_text))
            if isinstance(module, ACTIVATIONS):
                self.handles.append(module.register_forward_hook(partial(self.after, name)))

    def before(self, parameters: list[nn.Parameter], *_: Any) -> None:
        self.waiting += [p for p in parameters if p not in self.known]
        self.known.update(parameters)

    def enter_text(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self.mask = inputs[1]

    def leave_text(self, *_: Any) -> None:
        self.mask = None

    @torch.no_grad()
    def after(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y, shares = output.detach(), {}
        if self.mask is not None and self.mask.shape == y.shape[:-1]:  # padding says nothing of the net
            inputs, y = (inputs[0][self.mask],), y[self.mask]
        position = curve_position(module, inputs)
        if position is not None:
            shares = shares_of(*position, bounded=not isinstance(module, GatedActivation))
        rows = at_least_fp32(y).movedim(channel_dim(module), -1).flatten(0, -2)
        if name not in self.layers:
            self.layers[name] = Layer(module, self.waiting, rows.shape[1], tuple(shares))
            self.waiting = []
            if name in self.sampled and position is not None:
                self.layers[name].sample = sample(position[1], y)
        layer = self.layers[name]
        mean = rows.mean(0)  # and the variance around it: twice as fast as torch.var on a CPU
        moments = [mean, (rows - mean).square_().mean(0)]
        layer.calls.append(torch.cat([*moments, *(share.to(mean)[None] for share in shares.values())]))
        layer.counts.append(len(rows))

    def read_gradients(self) -> None:
        for layer in self.layers.values():
            if grads := [p.grad for p in layer.feeding if p.grad is not None]:
                layer.grad_norm = nn.utils.get_total_norm(grads)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def channel_dim(module: Any) -> int:
    return -1 if isinstance(module, PillarCurve) else module.dim


def curve_position(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, Tensor] | None:
    """The function that makes t, and t, or gate5's gate; None where the arm has neither."""
    x, function = inputs[0].detach(), "sigmoid"
    match module:
        case BezierActivation():
            dim, function = module.dim % x.dim(), module.t_activation
            if module.layout == "planar":
                x = x.unflatten(dim, (module.expansion, -1)).select(dim, 0)
            else:
                x = x.unflatten(dim, (-1, module.expansion)).select(dim + 1, 0)
        case PillarCurve(layout="interleaved"):
            x = torch.cat([x, *inputs[1].detach()], dim=-1)[..., :: len(inputs[1]) + 1]
        case PillarCurve() | TrainableBezier():
            pass
        case GatedActivation() if module.function is gate5:
            x = x.narrow(module.dim, 0, module.channels)
        case _:
            return None
    return function, pre_activate(function, widen(x))


def shares_of(function: str, t: Tensor, bounded: bool) -> dict[str, Tensor]:
    """`outside` where t must be within [0, 1] to be `bounded`, `saturated` where `function` has flat ends."""
    found = {"outside": ((t < 0) | (t > 1)).to(t.dtype).mean()} if bounded else {}
    if function in FLAT:
        low, high = FLAT[function]
        found["saturated"] = ((t < low) | (t > high)).to(t.dtype).mean()
    return found


def sample(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Values of both at the same places, drawn once and for all for each size; the global generators are not asked."""
    places = torch.randint(t.numel(), (min(t.numel(), MAX_SAMPLES),), generator=torch.Generator().manual_seed(0))
    places = places.to(t.device)
    return t.flatten()[places], at_least_fp32(y.flatten()[places])
