import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.models import transposed
from fluxflow_train.models.bezier import BezierActivation
from fluxflow_train.models.transposed import ActivatedUpsampling


def both_ways(layer: ActivatedUpsampling, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """[output, gradients of input, weight, bias] by phases and by the plain form."""
    results = []
    for by_phases in (True, False):
        monkeypatch.setattr(ActivatedUpsampling, "by_phases", lambda self, x, answer=by_phases: answer)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)).sum(), [leaf, *layer.parameters()]
        )
        results.append([y, *grads])
    return results


@pytest.mark.parametrize("kernel_size", [4, 8, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_phases_are_the_transposed_convolution(
    kernel_size: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = ActivatedUpsampling(3, 4, kernel_size, 5, BezierActivation("tanh", "silu")).double()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    phases, plain = both_ways(layer, x, monkeypatch)
    for a, b in zip(phases, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_published_kernel_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = ActivatedUpsampling(16, 16, 16, 1, nn.Identity())
    phases, plain = both_ways(layer, torch.randn(2, 16, 8, 8), monkeypatch)
    for a, b in zip(phases, plain, strict=True):
        assert (a - b).abs().max() < 5e-6 * b.abs().max()


def test_choice_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ActivatedUpsampling(3, 4, 16, 1, nn.Identity())
    x = torch.zeros(1, 3, 4, 4)
    for amx in (False, True):
        monkeypatch.setattr(transposed, "has_amx", lambda amx=amx: amx)
        assert layer.by_phases(x) and not layer.by_phases(x.to("meta"))
        assert layer.by_phases(x.bfloat16()) is not amx
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.by_phases(x) is not amx
    assert not ActivatedUpsampling(3, 4, 8, 1, nn.Identity()).by_phases(x)
    assert not layer.by_phases(x[..., :1])


def test_odd_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5, expected an even number"):
        ActivatedUpsampling(3, 4, 5, 1, nn.Identity())
