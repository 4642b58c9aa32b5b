"""Builds bezier_cpu.cpp for one activation and binds it: half a second, so nothing is kept on disk.

N outer and M inner positions, K = degree + 2 planes: contiguous (N, K, M) in, (N, M) out (see bezier_curve.py).
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("bezier_cpu.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ACTIVATIONS = ("none", "sigmoid", "tanh", "silu")  # the numbers that the source gives them
# No -ffast-math: it would let a NaN pass for a number.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")


class BuildError(RuntimeError):
    """This machine can't build the kernel; the message says why in one line."""


def build(t_name: str, p_name: str, degree: int) -> ctypes.CDLL:
    """Compile and load the kernel of one activation.

    Raises: BuildError without a working C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not sys.platform.startswith("linux") or not compiler:
        raise BuildError("no C++ compiler: on Linux install g++")
    defines = {"DEGREE": degree, "T_ACT": ACTIVATIONS.index(t_name), "P_ACT": ACTIVATIONS.index(p_name)}
    # The OpenMP that torch has loaded, if it brings one: two of them would fight for the cores.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    with tempfile.TemporaryDirectory(prefix="bezier") as folder:
        library = Path(folder) / "kernel.so"
        command = [compiler, *FLAGS, *(f"-D{name}={value}" for name, value in defines.items()), SOURCE, *openmp[:1]]
        try:
            subprocess.run([*command, "-o", library], check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{compiler} failed: {error.stderr.strip().splitlines()[0]}") from error
        except OSError as error:
            raise BuildError(str(error)) from error


def bind(library: ctypes.CDLL, dtype: torch.dtype, gain: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(forward, backward) with the arguments and results of their namesakes in bezier_curve.py."""
    run_forward = getattr(library, f"forward_{DTYPES[dtype]}")
    run_backward = getattr(library, f"backward_{DTYPES[dtype]}")
    sizes = [ctypes.c_longlong, ctypes.c_longlong, ctypes.c_float, ctypes.c_int]
    run_forward.argtypes, run_forward.restype = [ctypes.c_void_p] * 2 + sizes, None
    run_backward.argtypes, run_backward.restype = [ctypes.c_void_p] * 3 + sizes, None

    def forward(x: Tensor) -> Tensor:
        n, _, m = x.shape
        y = x.new_empty(n, m)
        run_forward(x.data_ptr(), y.data_ptr(), n, m, gain, torch.get_num_threads())
        return y

    def backward(x: Tensor, grad: Tensor) -> Tensor:
        n, _, m = x.shape
        x_grad = torch.empty_like(x)
        run_backward(x.data_ptr(), grad.data_ptr(), x_grad.data_ptr(), n, m, gain, torch.get_num_threads())
        return x_grad

    return forward, backward
