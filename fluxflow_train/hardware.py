"""What the machine is good at."""

import torch

from fluxflow_train.errors import UserError


def device_of(name: str) -> torch.device:
    """A torch device; "auto" is the GPU if there is one. Raises UserError where the machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not to be had here: use device=auto or device=cpu") from error


def fastest_precision(device: torch.device) -> str:
    """Lightning's name for the fastest training precision that keeps fp32's range.

    A CPU wants AMX for bf16: with AVX512-bf16 alone a bf16 convolution is no faster than an fp32 one.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if has_bf16 else "32-true"
