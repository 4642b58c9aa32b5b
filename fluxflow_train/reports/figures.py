"""What the page shows, as plain numbers and base64 PNGs: the page is rendered from the JSON alone.

C channels, H W pixels, T points on a curve.
"""

import base64
import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fluxflow_train.models.bezier import TrainableBezier
from fluxflow_train.reports.passes import Example

MAX_POINTS = 300
MAX_SIDE = 256
MAX_CHANNELS = 16
AMPLIFY = 4
CURVE_POINTS = 41


def training_curves(path: Path) -> dict[str, dict[str, list[float]]]:
    """Each column of `metrics.csv` as {x: images seen, y, low, high}; {} if there is no such file.

    Long series are cut into at most 300 bins of equal count: the mean, and the range in each. Non-finite rows are
    left out.
    """
    if not path.exists():
        return {}
    series: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name != "images_seen" and text and math.isfinite(float(text)):
                    series.setdefault(name, []).append((float(row["images_seen"]), float(text)))
    return {name: thin(points) for name, points in series.items()}


def thin(points: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """At most 300 bins of equal count, each its mean x and y and the range of y."""
    bins = np.array_split(np.array(points), min(len(points), MAX_POINTS))
    return {
        "x": [round(float(b[:, 0].mean()), 1) for b in bins],
        "y": [significant(b[:, 1].mean()) for b in bins],
        "low": [significant(b[:, 1].min()) for b in bins],
        "high": [significant(b[:, 1].max()) for b in bins],
    }


def significant(value: float) -> float:
    """Rounded to 6 digits, to keep the file small."""
    return float(f"{value:.6g}")


def learned_curves(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Each trainable Bezier of the model: its curves over t, its control points, and where t lies while `run` calls it.

    Of more than 16 channels, 16 evenly spaced ones are kept.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, TrainableBezier)}
    counts: dict[str, Tensor] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            t = torch.sigmoid(args[0].float()).cpu()
            counts[name] = counts.get(name, 0) + torch.histc(t, bins=40, min=0, max=1).long()

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    return [
        curve(name, module.points) | {"t_histogram": counts[name].tolist() if name in counts else []}
        for name, module in modules.items()
    ]


def curve(name: str, points: Tensor) -> dict[str, Any]:
    """{name, num_channels, channels, t (T,), values (channels, T), points (channels, 4)} of control points (4, C)."""
    points = points.detach().double().cpu()
    total = points.shape[1]
    channels = torch.linspace(0, total - 1, min(total, MAX_CHANNELS)).round().long()
    t = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)[:, None, None]
    weights = torch.cat([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], dim=1)
    values = (weights * points[:, channels]).sum(1)
    return {
        "name": name,
        "num_channels": total,
        "channels": channels.tolist(),
        "t": t.flatten().tolist(),
        "values": [[significant(v) for v in row] for row in values.T.tolist()],
        "points": [[significant(v) for v in row] for row in points[:, channels].T.tolist()],
    }


def picture(image: Tensor, max_side: int = MAX_SIDE) -> str:
    """uint8 (3, H, W) as a base64 PNG, reduced to at most `max_side` pixels a side."""
    return encoded(Image.fromarray(image.permute(1, 2, 0).numpy()), max_side)


def encoded(pil: Image.Image, max_side: int) -> str:
    """An RGB image as a base64 PNG, reduced to at most `max_side` pixels a side."""
    pil.thumbnail((max_side, max_side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    pil.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def example(item: Example) -> dict[str, Any]:
    """Input, reconstruction and their absolute difference times `AMPLIFY`, as pictures."""
    difference = (item.image.short() - item.reconstruction.short()).abs().mul(AMPLIFY).clamp(max=255).byte()
    return {
        "index": item.index,
        "key": item.key,
        "caption": item.caption,
        "psnr": round(item.psnr, 3) if math.isfinite(item.psnr) else None,
        "input": picture(item.image),
        "reconstruction": picture(item.reconstruction),
        "difference": picture(difference),
    }


def histogram(values: Sequence[float], num_bins: int = 32) -> dict[str, list[float]]:
    """Counts of the finite values in equal bins: {edges (num_bins + 1), counts}."""
    finite = [v for v in values if math.isfinite(v)]
    counts, edges = np.histogram(finite, bins=num_bins)
    return {"edges": [significant(e) for e in edges], "counts": counts.tolist()}
