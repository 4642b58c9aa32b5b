"""Whether the trained nets are healthy, said of every arm by the same rules, from a few batches of the run.

A layer is an activation (a module made by `models.activations.arm`, the curve of a pillar block, a trainable Bezier
head) together with the parameters that feed it: those of all modules that ran since the activation before it. Depth is
the order in which the layers run; text comes before flow. C channels.

dead        share of channels whose variance over all positions of the batch is at most a millionth of the layer's mean
            (a thousandth of the typical deviation): a ReLU that never opens, and a curve that always says the same.
            The padding of texts is left out.
outside     share of t outside [0, 1], where a curve is no longer between its control points. Curves only.
saturated   share of t where its function is flat: sigmoid within 0.01 of 0 or 1, tanh within 0.02 of -1 or 1 (the same
            slope). Curves, and the sigmoid gate of `gate5`; other arms have nothing that is meant to stay between two
            bounds, nor have t = silu(x) and t = x.
variance    mean over channels of the variance over positions, of the output.
grad_norm   of the feeding parameters, of the whole batch, reduced over ranks, before clipping.

Ranks look at their own shares and the sums are reduced: the numbers are of the global batch. Densities are of the first
part of the first rank's share. Nothing depends on anything but weights and batch, so a resumed run says the same.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from fluxflow_train import ranks
from fluxflow_train.callbacks.watch import Layer, Watch
from fluxflow_train.files import write_atomically
from fluxflow_train.models.activations import BezierChannel, GatedActivation
from fluxflow_train.models.bezier import BezierActivation, TrainableBezier
from fluxflow_train.models.flow import PillarCurve
from fluxflow_train.reports.figures import curve, significant
from fluxflow_train.sharding import whole

FILE_NAME = "health.json"
DEAD = 1e-6  # of the layer's mean variance
NO_GRADIENT = 1e-12  # of the largest norm: what a layer without any gradient counts as
DENSITY_BINS, CURVE_BINS = 24, 40


class Health(L.Callback):
    """Looks at one batch in every `share` of the budget, and the last: scalars to the loggers, the rest to health.json.

    Asks the task for `ema_modules()`, `images_seen` and `record`. On all other batches it does nothing. The file is
    replaced at each look. Stands before the callbacks that use the nets or save: what they do is not looked at, and a
    checkpoint has the looks before it.
    """

    def __init__(self, folder: str, budget_images: int, share: float):
        if not 0 < share <= 1:
            raise ValueError(f"share of the budget must be in (0, 1], got {share}")
        self.folder = Path(folder)
        self.budget_images = budget_images
        self.every_images = max(1, round(share * budget_images))
        self.history: dict[str, list[float | None]] = {"images": []}
        self.watch: Watch | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before: int = pl_module.images_seen
        after = before + len(batch["index"]) * trainer.world_size
        if after // self.every_images > before // self.every_images or after >= self.budget_images:
            self.watch = Watch(pl_module.ema_modules(), with_samples=trainer.is_global_zero)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Before the clipping; of several backwards in a batch the last one, which has all their gradients, stays.
        if self.watch is not None:
            self.watch.read_gradients()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.watch is None:
            return
        layers = self.watch.layers
        self.stop_watching()
        if not layers:  # a net of no arm
            return
        entries = measure(layers)
        scalars = summary(entries)
        self.history["images"].append(pl_module.images_seen)
        for name, value in scalars.items():
            self.history.setdefault(name, []).append(value)
        pl_module.record({f"health/{name}": value for name, value in scalars.items() if value is not None})
        points = {n: whole(la.module.points) for n, la in layers.items() if isinstance(la.module, TrainableBezier)}
        if trainer.is_global_zero:
            content = {"images_seen": pl_module.images_seen, "layers": entries, "history": self.history}
            content |= {"curves": learned(layers, points), "densities": densities(layers)}
            write_atomically(self.folder / FILE_NAME, json.dumps(content, allow_nan=False).encode())

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.stop_watching()

    def stop_watching(self) -> None:
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(values) for name, values in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


def measure(layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """The entries of the layers, by one transfer from the device and one reduction over ranks."""
    calls = [torch.stack(layer.calls) for layer in layers.values()]
    none = torch.full((), math.nan, device=calls[0].device)
    norms = [none if layer.grad_norm is None else whole(layer.grad_norm) for layer in layers.values()]
    host = torch.cat([part.flatten() for part in (*calls, *norms)]).cpu().double()
    *parts, grad_norms = host.split([*(c.numel() for c in calls), len(layers)])
    moments = [over_calls(layer, part) for layer, part in zip(layers.values(), parts, strict=True)]
    reduced = ranks.mean(torch.cat([*moments, grad_norms]))
    *moments, grad_norms = reduced.split([*(len(m) for m in moments), len(layers)])
    entries = []
    for depth, (name, layer) in enumerate(layers.items()):
        count, means = moments[depth][0], moments[depth][1:]
        mean, square, shares = (means / count).split([layer.channels, layer.channels, len(layer.shares)])
        variance = (square - mean.square()).clamp(min=0)
        entry = {"name": name, "kind": kind(layer.module), "depth": depth, "outside": None, "saturated": None}
        entry |= dict(zip(layer.shares, map(known, shares.tolist()), strict=True))
        entry["variance"] = known(variance.mean().item())
        dead = (variance <= DEAD * variance.mean()).double().mean().item()
        entry["dead"] = None if entry["variance"] is None else dead
        entry["grad_norm"] = known(grad_norms[depth].item())
        entries.append(entry)
    return entries


def over_calls(layer: Layer, values: Tensor) -> Tensor:
    """The number of positions in all calls of a batch, and the sums over them: x and x^2 by channel, and the shares."""
    mean, variance, shares = values.view(len(layer.counts), -1).tensor_split(
        (layer.channels, 2 * layer.channels), dim=1
    )
    counts = torch.tensor(layer.counts, dtype=torch.float64)
    return counts @ torch.cat([torch.ones(len(counts), 1), mean, variance + mean.square(), shares], dim=1)


def kind(module: nn.Module) -> str:
    """The arm's name; `pillars` for the curve of a pillar block, `trainable_bezier` for a head."""
    match module:
        case GatedActivation():
            return module.function.__name__
        case BezierActivation():
            return "bezier" if module.degree == 3 else f"bernstein{module.degree}"
        case PillarCurve():
            return "pillars"
    return "bezier_channel" if isinstance(module, BezierChannel) else "trainable_bezier"


def known(value: float) -> float | None:
    """None where it is not finite: JSON has no name for that."""
    return value if math.isfinite(value) else None


def summary(entries: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the arm's layers that have the value, heads left out; `grad_norm_spread` of all, in powers of ten."""
    own = [entry for entry in entries if entry["kind"] != "trainable_bezier"]

    def over(combine: Callable[[list[float]], float], name: str, layers: list[dict[str, Any]] = own) -> float | None:
        values = [entry[name] for entry in layers if entry[name] is not None]
        return known(combine(values)) if values else None

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def spread(norms: list[float]) -> float:
        largest = max(norms)
        return math.log10(largest / max(min(norms), NO_GRADIENT * largest)) if largest else math.nan

    return {
        "dead": over(mean, "dead"),
        "dead_worst": over(max, "dead"),
        "saturated": over(mean, "saturated"),
        "outside": over(mean, "outside"),
        "grad_norm_spread": over(spread, "grad_norm", entries),
        "variance_last": entries[-1]["variance"],
    }


def learned(layers: dict[str, Layer], points: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The trainable Beziers after the batch's update, each as in a report, with where its t lay before it."""
    found = []
    for name, values in points.items():
        picked = layers[name].sample
        assert picked is not None
        counts = np.histogram(finite(picked[0]), bins=CURVE_BINS, range=(0, 1))[0]
        found.append(curve(name, values) | {"t_histogram": counts.tolist()})
    return found


def densities(layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Of up to 8 input-based curves: counts[i][j] of t in bin i and B(t), the output without its gain, in bin j."""
    found = []
    for depth, (name, layer) in enumerate(layers.items()):
        if layer.sample is None or isinstance(layer.module, TrainableBezier):
            continue
        gain = layer.module.gain if isinstance(layer.module, BezierActivation) else 1.0
        t, y = finite(torch.stack([layer.sample[0], layer.sample[1] / gain]))
        counts, t_edges, y_edges = np.histogram2d(t, y, bins=DENSITY_BINS, range=None if len(t) else ((0, 1), (0, 1)))
        edges = {f"{axis}_edges": [significant(e) for e in values] for axis, values in (("t", t_edges), ("y", y_edges))}
        found.append({"name": name, "depth": depth, **edges, "counts": counts.astype(int).tolist()})
    return found


def finite(values: Tensor) -> np.ndarray:
    """On the host, in double precision; a column with a value that is not finite is left out."""
    array = values.cpu().double().numpy()
    return array[..., np.isfinite(array).reshape(-1, array.shape[-1]).all(0)]
