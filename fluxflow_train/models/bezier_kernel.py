"""The Bezier activation as one autograd function: fused both ways, nothing saved but the input.

Every input comes as a contiguous (N, K, M) tensor (see bezier_curve.py), so a few kernels serve all layouts and sizes.
A kernel is chosen by (device, dtype) and by whether this machine can compile, never by a timing: a resumed run takes
the same one. CPU: bezier_cpu.cpp (2.5 times as fast as torch.compile's kernel, and compiled in 0.5 s instead of 15).
CUDA: torch.compile. Every other device and dtype, and a CPU without a compiler: the same arithmetic in plain torch.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxflow_train.models import bezier_cpu, bezier_curve

Kernels = tuple[Callable[..., Tensor], Callable[..., Tensor]]
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is for checking gradients


def eager_kernels(t_name: str, p_name: str, gain: float) -> Kernels:
    """(forward, backward): (N, K, M) to (N, M), and (N, K, M), (N, M) to (N, K, M)."""
    constants = {"t_name": t_name, "p_name": p_name, "gain": gain}
    return functools.partial(bezier_curve.forward, **constants), functools.partial(bezier_curve.backward, **constants)


def compiled_kernels(t_name: str, p_name: str, gain: float) -> Kernels:
    """`eager_kernels` through torch.compile, each for any (N, M)."""
    kernels = []
    for function in (bezier_curve.forward, bezier_curve.backward):

        def run(*tensors: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*tensors, t_name, p_name, gain)

        # torch.compile gives up on the 8th recompilation of one code object, so every kernel has its own.
        run.__code__ = run.__code__.replace(co_name=f"bezier_{function.__name__}")
        kernels.append(torch.compile(run, dynamic=True))
    return kernels[0], kernels[1]


@functools.cache
def cpu_kernels(t_name: str, p_name: str, degree: int) -> Callable[[torch.dtype, float], Kernels]:
    """Builds once for all dtypes and gains."""
    try:
        return functools.partial(bezier_cpu.bind, bezier_cpu.build(t_name, p_name, degree))
    except bezier_cpu.BuildError as error:
        warnings.warn(f"The Bezier activation runs several times slower ({error}).", stacklevel=2)
        return lambda _, gain: eager_kernels(t_name, p_name, gain)


@functools.cache
def choose_kernels(device_type: str, dtype: torch.dtype, t_name: str, p_name: str, degree: int, gain: float) -> Kernels:
    """The only choice between kernels."""
    if device_type == "cpu" and dtype in bezier_cpu.DTYPES:
        return cpu_kernels(t_name, p_name, degree)(dtype, gain)
    if device_type == "cuda" and dtype in CUDA_DTYPES:
        return compiled_kernels(t_name, p_name, gain)
    return eager_kernels(t_name, p_name, gain)


def kernels_for(x: Tensor, t_name: str, p_name: str, gain: float) -> Kernels:
    """A tensor without memory of its own (fake, wrapped, traced by an outer torch.compile) takes plain torch."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return eager_kernels(t_name, p_name, gain)
    return choose_kernels(x.device.type, x.dtype, t_name, p_name, x.shape[1] - 2, gain)


class BezierFunction(torch.autograd.Function):
    """(N, K, M) to (N, M), contiguous; can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t_name: str, p_name: str, gain: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = (t_name, p_name, gain)
        # Not under autocast's eye: the state is part of what torch.compile specialises on.
        device_type = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # meta has none
        with torch.autocast(device_type, enabled=False):
            return kernels_for(x, *ctx.constants)[0](x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        # Gradients are being recorded: this is the first of two derivatives, and plain torch knows the second.
        kernels = eager_kernels if torch.is_grad_enabled() else functools.partial(kernels_for, x)
        return kernels(*ctx.constants)[1](x, grads[0].contiguous()), None, None, None
