"""What a number in a report means: the pinned protocol and its hash, the machine, the model's identity."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fluxflow_train.generation import Settings
from fluxflow_train.metrics import features, reconstruction

PACKAGES = ("torch", "torchmetrics", "numpy", "lightning")


def vae_protocol(split: str, height: int, width: int, seed: int, with_features: bool) -> dict[str, Any]:
    """Two reports compare only where this agrees; `hash` covers everything else in it."""
    protocol: dict[str, Any] = {
        "id": "vae-reconstruction/v1",
        "split": split,
        "image_size": [height, width],
        "seed": seed,
        "quantization": "(x + 1) / 2, * 255 + 0.5, clamped to [0, 255], floored to uint8",
        "psnr": "per image, peak 255, mean over images; exact copies left out and counted",
        "nonwhite": "pixels of the input that are not exactly (255, 255, 255)",
        "ssim": reconstruction.SSIM | {"border": "reflected, counted", "implementation": "torchmetrics, float32"},
        "posterior": "mean (eps = 0); psnr_sampled draws eps from (seed, 'eval-eps', index)",
        "precision": "float32, autocast and TF32 off",
        "features": f"{features.NAME}, {features.RESIZE}" if with_features else "none",
    }
    return protocol | {"hash": digest([json.dumps(protocol, sort_keys=True)])}


def flow_protocol(split: str, settings: Settings, num_images: int) -> dict[str, Any]:
    """As `vae_protocol`, of drawn pictures."""
    protocol: dict[str, Any] = {
        "id": "text-to-image/v1",
        "split": split,
        "images": num_images,
        "image_size": [settings.height, settings.width],
        "seed": settings.seed,
        "solver": settings.solver,
        "steps": settings.steps,
        "guidance": list(settings.guidance),
        "prompts": "first caption of each of the first images of the split; noise from (seed, 'sample-noise', number)",
        "quantization": "(x + 1) / 2, * 255 + 0.5, clamped to [0, 255], floored to uint8",
        "precision": "float32, autocast and TF32 off",
        "features": f"{features.NAME}, {features.RESIZE}",
    }
    return protocol | {"hash": digest([json.dumps(protocol, sort_keys=True)])}


def digest(parts: Sequence[str]) -> str:
    """sha256 of the strings, one a line, in hex."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def processor_name() -> str:
    """As the system names it; the bare architecture where it does not."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware. Nothing that names the person or the host."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "world_size": 1,
    }


def forget_peak_memory(device: torch.device) -> None:
    """Count anew on a GPU; a CPU process has one peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """GPU: the allocator's peak; CPU: the peak resident memory of the whole process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
