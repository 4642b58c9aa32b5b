"""Where each tensor of a FluxFlow 0.8 compressor and expander lives in `FluxFlow08VAE`: one map, read both ways.

Theirs interleaves the channels before a Bezier activation (5f + k), ours are planar (kC + f); theirs keeps the control
points of a trainable curve as p0..p3 (C,), ours as one (4, C).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fluxflow_train.models.fluxflow08 import FluxFlow08VAE

PREFIX = "diffuser."
PLANES = 5


class Entry(NamedTuple):
    """`theirs` is `ours`, with the Bezier channels along `planar_dim` reordered, or row `point` of it."""

    theirs: str
    ours: str
    planar_dim: int | None = None
    point: int | None = None

    def to_ours(self, tensor: Tensor) -> Tensor:
        if self.planar_dim is None:
            return tensor
        return (
            tensor.unflatten(self.planar_dim, (-1, PLANES))
            .movedim(self.planar_dim + 1, self.planar_dim)
            .reshape(tensor.shape)
        )

    def to_theirs(self, tensor: Tensor) -> Tensor:
        if self.point is not None:
            return tensor[self.point]
        if self.planar_dim is None:
            return tensor
        return (
            tensor.unflatten(self.planar_dim, (PLANES, -1))
            .movedim(self.planar_dim, self.planar_dim + 1)
            .reshape(tensor.shape)
        )


def layer(theirs: str, ours: str, *, planar_dim: int | None = None, bias: bool = True) -> list[Entry]:
    """Weight and bias; `planar_dim` is that of the weight."""
    entries = [Entry(f"{theirs}.weight", f"{ours}.weight", planar_dim)]
    if bias:
        entries.append(Entry(f"{theirs}.bias", f"{ours}.bias", None if planar_dim is None else 0))
    return entries


def points(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.p{k}", f"{ours}.points", point=k) for k in range(4)]


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


def entries_of(vae: FluxFlow08VAE) -> list[Entry]:
    """The whole map of this architecture: `diffuser.compressor.*` and `diffuser.expander.*`."""
    parts = {
        "compressor": compressor_entries(vae.downscales, vae.attn_layers),
        "expander": expander_entries(vae.upscales),
    }
    return [
        entry._replace(theirs=f"{PREFIX}{part}.{entry.theirs}", ours=f"{part}.{entry.ours}")
        for part, entries in parts.items()
        for entry in entries
    ]


def to_theirs(vae: FluxFlow08VAE) -> dict[str, Tensor]:
    """The published names and layouts, contiguous copies on the CPU."""
    state = vae.state_dict()
    return {
        e.theirs: e.to_theirs(state[e.ours]).cpu().clone(memory_format=torch.contiguous_format) for e in entries_of(vae)
    }


def to_ours(vae: FluxFlow08VAE, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict for `vae`; every key of the map must be in `published`."""
    state: dict[str, Tensor] = {}
    for entry in entries_of(vae):
        tensor = published[entry.theirs]
        if entry.point is None:
            state[entry.ours] = entry.to_ours(tensor)
        else:
            state.setdefault(entry.ours, tensor.new_empty(4, *tensor.shape))[entry.point] = tensor
    return state
