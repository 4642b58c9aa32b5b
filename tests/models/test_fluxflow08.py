import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxflow_train.interop import keys08
from fluxflow_train.models.fluxflow08 import FluxFlow08VAE, position_encoding

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def peers(width: int, downscales: int) -> tuple[Any, Any]:
    """The package's compressor and expander with its own initial weights, a little disturbed (zeros and ones hide)."""
    v080: Any = pytest.importorskip("fluxflow.models.v080", reason="the peer fluxflow==0.8.1 is not installed")
    torch.manual_seed(width + downscales)
    compressor = v080.FluxCompressor(d_model=width, downscales=downscales).eval()
    expander = v080.FluxExpander(d_model=width, upscales=downscales).eval()
    with torch.no_grad():
        for parameter in [*compressor.parameters(), *expander.parameters()]:
            parameter += 0.005 * torch.randn_like(parameter)
    return compressor, expander


def packed_rows(z: Tensor) -> Tensor:
    """The package's form (B, L + 1, D) of a latent (B, D, h, w): one row per position, and one for the grid."""
    last = z.new_zeros(len(z), 1, z.shape[1])
    last[..., 0], last[..., 1] = z.shape[-2] / 1024, z.shape[-1] / 1024
    return torch.cat([z.flatten(2).mT, last], dim=1)


def published(compressor: Any, expander: Any) -> dict[str, Tensor]:
    parts = {"compressor": compressor, "expander": expander}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def load(vae: FluxFlow08VAE, weights: dict[str, Tensor]) -> None:
    vae.load_state_dict(keys08.to_ours(keys08.vae_entries(vae), weights, vae.state_dict()))


@pytest.mark.parametrize(("width", "downscales"), list(itertools.product((16, 32), (3, 4))))
def test_same_numbers_as_the_package(width: int, downscales: int) -> None:
    compressor, expander = peers(width, downscales)
    vae = FluxFlow08VAE(width, downscales, downscales)
    load(vae, published(compressor, expander))
    for dtype, tolerance in TOLERANCE.items():
        for net in (compressor, expander, vae):
            net.to(dtype)
        for height, width_px in ((2, 3), (4, 4)):
            size = height * vae.stride, width_px * vae.stride
            x = torch.rand(2, 3, *size, dtype=dtype) * 2 - 1
            with torch.no_grad():
                torch.manual_seed(5)
                packed, mu, logvar = compressor(x, training=True)
                torch.manual_seed(5)  # the package draws its noise from the global generator
                eps = torch.randn(2, width, height, width_px, dtype=dtype)
                eps = torch.cat([eps, torch.full_like(eps[:, :5], torch.nan)], dim=1)  # not read
                code = vae.compress(x, eps)
                grid = torch.cat([code.tokens, code.context], dim=1)
                pairs = {
                    "mu": (code.mu, mu),
                    "logvar": (code.logvar, logvar),
                    "packed": (packed_rows(grid), packed),
                    "image of its latent": (
                        vae.decode(packed[:, :-1].mT.unflatten(2, grid.shape[2:])),
                        expander(packed),
                    ),
                    "image": (vae(x, eps).x_hat, expander(packed)),
                }
            errors = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
            assert max(errors.values()) <= tolerance, (dtype, size, errors)


@pytest.mark.parametrize(("width", "downscales"), list(itertools.product((16, 32), (3, 4))))
def test_the_map_holds_every_key(width: int, downscales: int) -> None:
    weights = published(*peers(width, downscales))
    vae = FluxFlow08VAE(width, downscales, downscales)
    load(vae, weights)
    back = keys08.to_theirs(keys08.vae_entries(vae), vae.state_dict())
    assert back.keys() == weights.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, weights[name]), name


def test_our_parameters_are_all_in_the_map() -> None:
    vae = FluxFlow08VAE(16, 3, 3)
    assert {entry.ours for entry in keys08.vae_entries(vae)} == set(vae.state_dict())


def test_published_sizes() -> None:
    with torch.device("meta"):
        vae = FluxFlow08VAE(128, 4, 4)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (vae.compressor, vae.expander)]
    assert millions == pytest.approx([12.58, 92.85], abs=0.005)


def test_position_encoding() -> None:
    table = position_encoding(16, 3, 5, torch.device("cpu"))
    assert table.shape == (16, 3, 5)
    for y, x in ((0, 0), (2, 4)):
        for i in range(4):
            rate = 10_000 ** (-2 * i / 8)
            for half, position in ((0, y), (8, x)):
                expected = torch.tensor([position * rate]).sin(), torch.tensor([position * rate]).cos()
                torch.testing.assert_close(table[half + 2 * i : half + 2 * i + 2, y, x], torch.cat(expected))


def test_posterior_and_decode() -> None:
    torch.manual_seed(0)
    vae = FluxFlow08VAE(16, 3, 3)
    x, eps = torch.rand(2, 3, 24, 40) * 2 - 1, torch.zeros(2, *vae.latent_shape(24, 40))
    with torch.no_grad():
        mean, logvar = vae.posterior(x)
        assert mean.shape == logvar.shape == (2, vae.latent_channels, 3, 5)
        assert mean[:, :16].abs().max() < 1 and (logvar == -30).all()
        torch.testing.assert_close(vae.decode(mean), vae(x, eps).x_hat, rtol=0, atol=0)
        assert not torch.equal(vae.decode(mean), vae(x, eps + 1).x_hat)


def test_interface_of_a_vae() -> None:
    torch.manual_seed(0)
    vae = FluxFlow08VAE(16, 3, 3)
    assert vae.latent_shape(24, 40) == (21, 3, 5) and vae.stride == 8
    with pytest.raises(ValueError, match="multiple of 8, got 20 x 40"):
        vae.latent_shape(20, 40)
    x = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x, torch.zeros(2, 21, 3, 5))
    assert out.x_hat.shape == x.shape and out.mu.shape == out.logvar.shape == (2, 16, 3, 5)
    assert {tensor.dtype for tensor in out} == {torch.float32}
    (out.x_hat.square().mean() + out.mu.square().mean() + out.logvar.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert vae.last_layer.shape == (3, 48, 1, 1)
