"""The list of results: one entry per number, each with what it was measured on and how sure it is.

N images, H W pixels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fluxflow_train.metrics.baselines import PCA
from fluxflow_train.metrics.intervals import NORMAL_METHOD, mean_interval
from fluxflow_train.metrics.reconstruction import finite_mean
from fluxflow_train.reports.passes import SplitPass

Result = dict[str, Any]


def result(
    name: str,
    raw: float,
    *,
    label: str,
    unit: str,
    better: str | None,
    num_images: int,
    interval: tuple[float, float] | None = None,
    interval_method: str | None = None,
    baseline_of: str | None = None,
    baseline: str | None = None,
    note: str = "",
) -> Result:
    """One entry. A number that is not finite is null in JSON, and says so in its note.

    Args:
        better: "higher", "lower", or None where neither is.
        baseline_of, baseline: the result beside which this one is shown, and as what ("pca", "white", "noise_floor").
    """
    finite = math.isfinite(raw)
    return {
        "name": name,
        "label": label,
        "value": float(f"{raw:.6g}") if finite else None,
        "raw": raw if finite else None,
        "unit": unit,
        "better": better,
        "n_real": num_images,
        "n_fake": num_images,
        "interval": list(interval) if interval is not None else None,
        "interval_method": interval_method if interval is not None else None,
        "baseline_of": baseline_of,
        "baseline": baseline,
        "note": note if finite else f"undefined ({raw}) {note}".strip(),
    }


def mean_result(name: str, values: Sequence[float], **words: Any) -> Result:
    """The mean over images with its normal interval; images left out are counted in the note."""
    finite = sum(math.isfinite(v) for v in values)
    note = words.pop("note", "")
    if finite < len(values):
        note = f"{note}; {len(values) - finite} images without a finite value left out".removeprefix("; ")
    return result(
        name,
        finite_mean(values),
        num_images=finite,
        interval=mean_interval(values),
        interval_method=NORMAL_METHOD,
        note=note,
        **words,
    )


def reconstruction_results(
    measured: SplitPass, pca: PCA, num_train: int, shape: Sequence[int]
) -> tuple[list[Result], dict[str, Any]]:
    """PSNR, SSIM and rate with their baselines, and how those were made."""
    results = []
    kinds = (
        ("psnr", "PSNR", "dB"),
        ("psnr_nonwhite", "PSNR, non-white pixels", "dB"),
        ("ssim", "SSIM", ""),
    )
    rivals = (("pca", f"PCA, {pca.num_components} components"), ("white", "plain white"))
    for name, label, unit in kinds:
        words = {"unit": unit, "better": "higher"}
        results.append(mean_result(name, measured.scores["model"].per_image(name), label=label, **words))
        for rival, title in rivals:
            values = measured.scores[rival].per_image(name)
            results.append(
                mean_result(f"{name}_{rival}", values, label=title, baseline_of=name, baseline=rival, **words)
            )
    words = {"label": "PSNR, sampled latent", "unit": "dB", "better": "higher"}
    results.append(mean_result("psnr_sampled", measured.sampled_psnr, **words))
    rate = finite_mean(measured.rates)
    bits = rate / math.log(2) / (shape[0] * shape[1])
    results.append(
        mean_result(
            "rate_nats",
            measured.rates,
            label="Rate",
            unit="nats/image",
            better=None,
            note=f"{bits:.3f} bits per pixel; PSNR compares only at equal rate",
        )
    )
    return results, {"pca": {"components": pca.num_components, "train_images": num_train}}


def cost_results(vae: nn.Module, measured: SplitPass, memory: float | None, device: torch.device) -> list[Result]:
    """Speed, memory (MiB, None where unknown) and size. The first batch warms up and counts only where it is alone."""
    speeds = sorted(measured.speeds[1:] or measured.speeds)
    results = [
        result(
            "images_per_second",
            speeds[len(speeds) // 2],
            label="Encode + decode",
            unit="images/s",
            better="higher",
            num_images=len(measured.indices),
            note="fp32, median over batches",
        ),
        result(
            "parameters",
            float(sum(p.numel() for p in vae.parameters())),
            label="Parameters",
            unit="",
            better=None,
            num_images=0,
        ),
    ]
    if memory is not None:
        results.append(memory_result(memory, device, "one batch", "its first batch"))
    return results


def memory_result(memory: float, device: torch.device, what: str, until: str) -> Result:
    """`memory` in MiB: on a GPU of `what`, on a CPU of the process `until`, whatever it did before."""
    note = f"allocator, {what}" if device.type == "cuda" else f"resident, the process up to {until}"
    return result("peak_memory", memory, label="Peak memory", unit="MiB", better="lower", num_images=0, note=note)
