"""What a network costs: parameters, FLOPs, activation memory, latency; the quantities that two arms are compared by.

A *component* is a direct child of the network, by name ("encoder", "decoder"); "total" is the whole network.
`inputs(network)` returns the network's arguments for one image; the device is that of the context it is called in.
"""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Inputs = Callable[[nn.Module], tuple[Tensor, ...]]


class VAEInputs(NamedTuple):
    """One image and its noise for a VAE: x (1, 3, H, W) and eps (1, D, h, w), all zero."""

    height: int
    width: int

    def __call__(self, network: nn.Module) -> tuple[Tensor, ...]:
        latent: tuple[int, int, int] = network.latent_shape(self.height, self.width)  # type: ignore[operator]
        return torch.zeros(1, 3, self.height, self.width), torch.zeros(1, *latent)


class FlowInputs(NamedTuple):
    """What the flow of a TextToImage sees of one image of that size with a caption of `num_tokens`, all zero."""

    height: int
    width: int
    num_tokens: int

    def __call__(self, network: nn.Module) -> tuple[Tensor, ...]:
        latent: tuple[int, int, int] = network.vae.latent_shape(self.height, self.width)  # type: ignore[operator]
        hidden = torch.zeros(1, self.num_tokens, network.text.backbone.width)  # type: ignore[arg-type]
        mask = torch.ones(1, self.num_tokens, dtype=torch.bool)
        return torch.zeros(1, *latent), torch.zeros(1), hidden, mask, torch.zeros(1, dtype=torch.bool)


def parameters(network: nn.Module) -> dict[str, int]:
    """Parameters of each component and in total."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    return {**counts, "total": sum(p.numel() for p in network.parameters())}


def flops(network: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Forward FLOPs per image of each component and in total; a multiply-add is 2. `network` is on the meta device.

    Convolutions and matrix products only, as everywhere: the activations' own arithmetic is not in it. It shows in the
    latency.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs(network))
    counts = counter.get_flop_counts()
    root = type(network).__name__
    components = {name: sum(counts.get(f"{root}.{name}", {}).values()) for name, _ in network.named_children()}
    return {**components, "total": counter.get_total_flops()}


def activation_bytes(network: nn.Module, inputs: Inputs) -> int:
    """Bytes that one image's forward keeps for the backward, parameters not counted. `network` is on the meta device.

    In fp32 and eager: what autocast or a compiler saves differently is not in it.
    """
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their storages' addresses distinct

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.device("meta"), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(*inputs(network))
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)


def timed_forward(network: nn.Module, inputs: Inputs, device: str) -> Callable[[], float]:
    """A function that runs one image's forward on `device` and returns its seconds; it has run once to warm up.

    `network` may be on the meta device: its copy gets weights of 0.01.
    """
    copied = copy.deepcopy(network).to_empty(device=device).eval()
    for tensor in (*copied.parameters(), *copied.buffers()):
        torch.nn.init.constant_(tensor, 0.01)  # left as it is, memory may hold denormals, which are slow
    with torch.device(device):
        arguments = inputs(copied)

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        synchronised(copied(*arguments))
        return time.perf_counter() - start

    run()
    return run


def latency(network: nn.Module, inputs: Inputs, device: str, repeats: int = 5) -> float:
    """Median seconds of one image's forward on `device`; never twice equal."""
    run = timed_forward(network, inputs, device)
    return sorted(run() for _ in range(repeats))[repeats // 2]


def training_latency(network: nn.Module, inputs: Inputs, batch_size: int, device: str, repeats: int = 2) -> float:
    """Median seconds for each image of a forward and backward of `batch_size`, after one to warm up.

    The optimizer's step and the data are not in it. `network` may be on the meta device, as in `latency`.
    """
    copied = copy.deepcopy(network).to_empty(device=device).train()
    for tensor in (*copied.parameters(), *copied.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    with torch.device(device):
        arguments = [tensor.expand(batch_size, *tensor.shape[1:]).contiguous() for tensor in inputs(copied)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = copied(*arguments)
        (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
        synchronised(next(p.grad for p in copied.parameters() if p.grad is not None))
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[repeats // 2] / batch_size


def synchronised(output: Any) -> None:
    """Waits until the device has computed `output` (a tensor, or tensors in a tuple)."""
    first = output[0] if isinstance(output, tuple) else output
    first.flatten()[0].item()


class Row(NamedTuple):
    """One quantity of the reference and of the network that was matched to it."""

    quantity: str
    reference: float
    matched: float

    @property
    def residual(self) -> float:
        """Relative difference, 0.01 = the matched network costs 1 % more."""
        return self.matched / self.reference - 1


def residual_table(reference: nn.Module, matched: nn.Module, inputs: Inputs, device: str) -> list[Row]:
    """Parameters and FLOPs by component and in total, activation memory, and the latency measured on `device`.

    Both networks are on the meta device.
    """
    rows = []
    for label, count in {"parameters": parameters, "FLOPs per image": lambda net: flops(net, inputs)}.items():
        ours, theirs = count(matched), count(reference)
        rows += [Row(f"{label}, {name}", theirs[name], ours[name]) for name in theirs if theirs[name]]
    memory = [activation_bytes(net, inputs) for net in (reference, matched)]
    seconds = [latency(net, inputs, device) for net in (reference, matched)]
    return [*rows, Row("activation bytes per image", *memory), Row(f"seconds per image on {device}", *seconds)]


def render(rows: list[Row]) -> str:
    """The table as text, one line per quantity."""
    width = max(len(row.quantity) for row in rows)
    lines = [f"{'':<{width}}  {'reference':>14}  {'matched':>14}  {'residual':>8}"]
    for row in rows:
        values = [f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in (row.reference, row.matched)]
        lines.append(f"{row.quantity:<{width}}  {values[0]:>14}  {values[1]:>14}  {row.residual:>+8.2%}")
    return "\n".join(lines)
