import itertools

import pytest
import torch
from torch import Tensor

from fluxflow_train.models import bezier_cpu, bezier_kernel
from fluxflow_train.models.bezier import BezierActivation

PAIRS = [("sigmoid", "silu"), ("tanh", "silu"), ("sigmoid", "none"), ("none", "tanh"), ("silu", "sigmoid")]
SIZES = [(3, 700), (500, 7), (2000, 1), (1, 1)]  # (N, M): long stretches, short ones, none, less than a tile
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        bezier_cpu.build("sigmoid", "silu", 3)
    except bezier_cpu.BuildError as error:
        pytest.skip(str(error))


def inputs(n: int, m: int, degree: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(n, degree + 2, m).to(dtype), torch.randn(n, m).to(dtype)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("names", "degree"), list(itertools.product(PAIRS, (1, 2, 3))))
def test_cpu_kernel_is_the_closed_form(names: tuple[str, str], degree: int) -> None:
    library = bezier_cpu.build(*names, degree)
    plain = bezier_kernel.eager_kernels(*names, 1.5)
    for dtype, (n, m) in itertools.product(TOLERANCE, SIZES):
        fused = bezier_cpu.bind(library, dtype, 1.5)
        x, grad = inputs(n, m, degree, dtype)
        y, x_grad = fused[0](x), fused[1](x, grad)
        assert y.dtype == x_grad.dtype == dtype
        assert worst(y, plain[0](x.double())) < TOLERANCE[dtype]
        assert worst(x_grad, plain[1](x.double(), grad.double())) < TOLERANCE[dtype]


def test_saturated_inputs() -> None:
    forward, backward = bezier_kernel.choose_kernels("cpu", torch.float32, "sigmoid", "silu", 3, 1.0)
    plain = bezier_kernel.eager_kernels("sigmoid", "silu", 1.0)
    torch.manual_seed(0)
    x = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4])[torch.randint(0, 7, (64, 5, 33))]
    grad = torch.ones(64, 33)
    assert worst(forward(x), plain[0](x.double())) < 1e-6
    assert worst(backward(x, grad), plain[1](x.double(), grad.double())) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("plane", range(5))
def test_nan_stays_nan(plane: int, dtype: torch.dtype) -> None:
    forward, backward = bezier_kernel.choose_kernels("cpu", dtype, "tanh", "silu", 3, 1.0)
    x, grad = inputs(40, 50, 3, dtype)
    x[17, plane, 23] = float("nan")
    y, x_grad = forward(x), backward(x, grad)
    assert y.isnan().nonzero().tolist() == [[17, 23]]
    assert {tuple(where) for where in x_grad.isnan().nonzero()[:, [0, 2]].tolist()} == {(17, 23)}


def test_threads_change_no_bit() -> None:
    forward, backward = bezier_kernel.choose_kernels("cpu", torch.float32, "tanh", "silu", 3, 1.0)
    x, grad = inputs(37, 1001, 3, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append((forward(x), backward(x, grad)))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_without_a_compiler_it_is_slower_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(UserWarning, match="several times slower"):
        forward, _ = bezier_kernel.cpu_kernels.__wrapped__("sigmoid", "silu", 3)(torch.float32, 1.0)
    x, _ = inputs(3, 5, 3, torch.float32)
    torch.testing.assert_close(forward(x), bezier_kernel.eager_kernels("sigmoid", "silu", 1.0)[0](x))


def test_autocast_and_no_grad() -> None:
    x = torch.randn(2, 20, 8, 8)
    activation = BezierActivation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.conv2d(x, torch.randn(20, 20, 1, 1))
        assert activation(y).dtype == torch.bfloat16
    with torch.no_grad():
        assert not activation(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(activation(x), activation(x.detach().clone()))


def test_meta_tensors_have_shapes_only() -> None:
    assert BezierActivation()(torch.empty(2, 20, 4, 4, device="meta")).shape == (2, 4, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_compile_kernel(dtype: torch.dtype) -> None:
    """What CUDA runs, on the CPU's compiler."""
    compiled = bezier_kernel.compiled_kernels("tanh", "silu", 1.5)
    plain = bezier_kernel.eager_kernels("tanh", "silu", 1.5)
    for n, m in SIZES:
        x, grad = inputs(n, m, 3, dtype)
        assert worst(compiled[0](x), plain[0](x.double())) < TOLERANCE[dtype]
        assert worst(compiled[1](x, grad), plain[1](x.double(), grad.double())) < TOLERANCE[dtype]


@pytest.mark.slow
def test_inside_a_compiled_model() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 1), BezierActivation())
    x = torch.randn(2, 3, 8, 8)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    found = torch.autograd.grad(torch.compile(net)(x).square().sum(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
