import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.models.bezier import LAYOUTS, PRE_ACTIVATIONS, BezierActivation, TrainableBezier, bezier

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": nn.functional.silu, "none": lambda x: x}
CASES = list(itertools.product(PRE_ACTIVATIONS, PRE_ACTIVATIONS, LAYOUTS, (1, 2, 3)))


def naive(x: Tensor, t_name: str, p_name: str, layout: str, dim: int, degree: int = 3, gain: float = 1.0) -> Tensor:
    """Channel by channel, by de Casteljau's repeated interpolation: shares nothing with the code under test."""
    x = x.movedim(dim, 0)
    k = degree + 2
    channels = x.shape[0] // k
    outputs = []
    for f in range(channels):
        planes = [x[k * f + i] if layout == "interleaved" else x[channels * i + f] for i in range(k)]
        t, points = ACTIVATIONS[t_name](planes[0]), [ACTIVATIONS[p_name](p) for p in planes[1:]]
        while len(points) > 1:
            points = [(1 - t) * a + t * b for a, b in itertools.pairwise(points)]
        outputs.append(gain * points[0])
    return torch.stack(outputs).movedim(0, dim)


def call(x: Tensor, t_name: Any, p_name: Any, layout: Any, dim: int, degree: int = 3, gain: float = 1.0) -> Tensor:
    return bezier(x, t_activation=t_name, p_activation=p_name, layout=layout, dim=dim, degree=degree, gain=gain)


@pytest.mark.parametrize(("t_name", "p_name", "layout", "degree"), CASES)
def test_gradcheck(t_name: str, p_name: str, layout: str, degree: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2 * (degree + 2), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: call(x, t_name, p_name, layout, 1, degree, gain=1.5), x, fast_mode=True)
    torch.testing.assert_close(
        call(x, t_name, p_name, layout, 1, degree, 1.5), naive(x, t_name, p_name, layout, 1, degree, 1.5)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dim"), [((3, 20), 1), ((2, 7, 20), -1), ((2, 20, 5, 3), 1), ((2, 20, 1, 1), 1)])
def test_shapes(shape: tuple[int, ...], dim: int, layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(call(x, "sigmoid", "silu", layout, dim), naive(x, "sigmoid", "silu", layout, dim))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_is_kept(layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 5, 3)
    last = x.clone(memory_format=torch.channels_last).requires_grad_()
    strange = torch.randn(5, 20, 2, 3).transpose(0, 2)  # neither order
    y = call(last, "tanh", "silu", layout, 1)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last) and last.grad is not None
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    torch.testing.assert_close(y, call(x, "tanh", "silu", layout, 1))
    torch.testing.assert_close(
        call(strange, "tanh", "silu", layout, 1), call(strange.contiguous(), "tanh", "silu", layout, 1)
    )


def test_only_the_input_is_saved() -> None:
    x = torch.randn(2, 20, 4, 4, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        BezierActivation()(x)
    assert [t.untyped_storage().data_ptr() for t in saved] == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivative(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    """What R1 needs: the gradient of a squared gradient norm."""
    torch.manual_seed(0)

    def penalty_gradient(function, x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    x = torch.randn(2, 10, 3, 4, dtype=dtype, requires_grad=True)
    ours = penalty_gradient(lambda x: call(x, "tanh", "silu", layout, 1), x)
    reference = penalty_gradient(lambda x: naive(x, "tanh", "silu", layout, 1), x)
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


def test_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 5 channels, got 12"):
        BezierActivation()(torch.zeros(1, 12, 2, 2))


@pytest.mark.parametrize("wrong", [{"t_activation": "relu"}, {"layout": "blocked"}, {"degree": 4}])
def test_construction_is_strict(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        BezierActivation(**wrong)


def test_trainable_curve_starts_as_the_line() -> None:
    x = torch.linspace(-6, 6, 101).repeat(3, 1).T
    line = TrainableBezier(3, (-1, -1 / 3, 1 / 3, 1))(x)
    torch.testing.assert_close(line, 2 * torch.sigmoid(x) - 1)


def test_trainable_curve_is_the_bernstein_form() -> None:
    torch.manual_seed(0)
    curve = TrainableBezier(4, (0, 0, 0, 0)).double()
    with torch.no_grad():
        curve.points.normal_()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.sigmoid(x)
    basis = [math.comb(3, k) * (1 - t) ** (3 - k) * t**k for k in range(4)]
    expected = sum(b * p[:, None] for b, p in zip(basis, curve.points, strict=True))
    torch.testing.assert_close(curve(x), expected)
    assert torch.autograd.gradcheck(curve, x)


def test_trainable_curve_keeps_the_dtype() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    curve = TrainableBezier(3, (-1, -1 / 3, 1 / 3, 1))
    assert curve(x).dtype == torch.bfloat16
    torch.testing.assert_close(curve(x), curve(x.float()).bfloat16())
