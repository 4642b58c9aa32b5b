"""Where each tensor of a FluxFlow 0.8 compressor and expander lives in `FluxFlow08VAE`: one map, read both ways.

Theirs interleaves the channels before a Bezier activation (5f + k), ours are planar (kC + f); theirs keeps the control
points of a trainable curve as p0..p3 (C,), ours as one (4, C). The map of the rest is in keys08_flow.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fluxflow_train.models.fluxflow08 import FluxFlow08VAE

PLANES = 5
State = dict[str, Tensor]


class Entry(NamedTuple):
    """`theirs` is `ours[at]`, with the Bezier channels along `planar_dim` reordered and `trailing` axes of 1 behind.

    With `span` (axis, start, length) it is that part of `theirs`; the entries of one `theirs` stand in order.
    """

    theirs: str
    ours: str
    planar_dim: int | None = None
    at: tuple[int | slice, ...] = ()
    trailing: int = 0
    span: tuple[int, int, int] | None = None

    def to_ours(self, tensor: Tensor) -> Tensor:
        if self.span is not None:
            tensor = tensor.narrow(*self.span)
        tensor = tensor.reshape(tensor.shape[: tensor.dim() - self.trailing])
        if self.planar_dim is None:
            return tensor
        return (
            tensor.unflatten(self.planar_dim, (-1, PLANES))
            .movedim(self.planar_dim + 1, self.planar_dim)
            .reshape(tensor.shape)
        )

    def to_theirs(self, tensor: Tensor) -> Tensor:
        tensor = tensor[self.at]
        if self.planar_dim is not None:
            tensor = (
                tensor.unflatten(self.planar_dim, (PLANES, -1))
                .movedim(self.planar_dim, self.planar_dim + 1)
                .reshape(tensor.shape)
            )
        return tensor.reshape(*tensor.shape, *[1] * self.trailing)


def to_theirs(entries: Iterable[Entry], state: State) -> State:
    """The published names and layouts of our `state`."""
    published: State = {}
    for entry in entries:
        tensor = entry.to_theirs(state[entry.ours])
        if entry.theirs in published and entry.span is not None:
            tensor = torch.cat([published[entry.theirs], tensor], dim=entry.span[0])
        published[entry.theirs] = tensor
    return published


def to_ours(entries: Iterable[Entry], published: State, like: State) -> State:
    """Our state of the shapes of `like`; every key of the map must be in `published`."""
    state: State = {}
    for entry in entries:
        tensor = entry.to_ours(published[entry.theirs])
        if entry.at:
            state.setdefault(entry.ours, tensor.new_empty(like[entry.ours].shape))[entry.at] = tensor
        else:
            state[entry.ours] = tensor
    return state


def for_file(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def under(theirs: str, ours: str, entries: Iterable[Entry]) -> list[Entry]:
    """The same map with a prefix before each name."""
    return [e._replace(theirs=f"{theirs}{e.theirs}", ours=f"{ours}{e.ours}") for e in entries]


def layer(theirs: str, ours: str, *, planar_dim: int | None = None, bias: bool = True) -> list[Entry]:
    """Weight and bias; `planar_dim` is that of the weight."""
    entries = [Entry(f"{theirs}.weight", f"{ours}.weight", planar_dim)]
    if bias:
        entries.append(Entry(f"{theirs}.bias", f"{ours}.bias", None if planar_dim is None else 0))
    return entries


def points(theirs: str, ours: str, *, trailing: int = 0) -> list[Entry]:
    return [Entry(f"{theirs}.p{k}", f"{ours}.points", at=(k,), trailing=trailing) for k in range(4)]


def compressor_entries(downscales: int, attn_layers: int) -> list[Entry]:
    entries = []
    for i in range(downscales):
        entries += layer(f"encoder_first_step.{i}.0", f"stages.{2 * i}.0", planar_dim=0, bias=False)
        entries += layer(f"encoder_z.{i}.0", f"stages.{2 * i + 1}.0", planar_dim=0)
    for i in range(2):
        entries += layer(f"latent_proj.{i}.0", f"detail.{i}.0", planar_dim=0)
        entries += layer(f"mu_proj.{i}.0", f"mu.0.{i}.0", planar_dim=0)
        entries += layer(f"logvar_proj.{i}.0", f"logvar.0.{i}.0", planar_dim=0)
    entries += points("mu_activation", "mu.1") + points("logvar_activation", "logvar.1")
    for i in range(attn_layers):
        a, b = f"token_attn.{i}", f"context_blocks.{i}"
        entries += layer(f"{a}.norm1", f"{b}.norm1") + layer(f"{a}.norm2", f"{b}.norm2")
        entries += [Entry(f"{a}.attn.in_proj_{kind}", f"{b}.qkv.{kind}") for kind in ("weight", "bias")]
        entries += layer(f"{a}.attn.out_proj", f"{b}.out")
        entries += layer(f"{a}.ff.0", f"{b}.feed_forward.0.0", planar_dim=0)
        entries += layer(f"{a}.ff.2", f"{b}.feed_forward.1")
    return entries + layer("final_norm", "norm") + layer("context_proj", "context_out")


def expander_entries(upscales: int) -> list[Entry]:
    entries = []
    for i in range(upscales):
        a, b = f"upscale.layers.{i}", f"blocks.{i}"
        entries += layer(f"{a}.spade.mlp_shared.0", f"{b}.spade.hidden.0")
        entries += layer(f"{a}.spade.mlp_beta", f"{b}.spade.beta")
        entries += layer(f"{a}.conv1.0", f"{b}.up", planar_dim=1)
        entries += layer(f"{a}.conv1.2", f"{b}.refine.0", planar_dim=0)
    for i in (0, 1, 3, 4):
        entries += layer(f"to_rgb_conv.{i}", f"head.{i}")
    return entries + layer("to_rgb_conv.6", "rgb_conv") + points("rgb_activation", "rgb")


def vae_entries(vae: FluxFlow08VAE) -> list[Entry]:
    """`compressor.*` and `expander.*`."""
    return [
        *under("compressor.", "compressor.", compressor_entries(vae.downscales, vae.attn_layers)),
        *under("expander.", "expander.", expander_entries(vae.upscales)),
    ]
