"""Health against the same numbers computed another way, and the runs that it looks at against those that it doesn't."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.callbacks.health import Health, densities, measure, summary
from fluxflow_train.callbacks.watch import Watch
from fluxflow_train.models.activations import ARM_NAMES, arm
from fluxflow_train.models.bezier import BezierActivation, TrainableBezier
from fluxflow_train.models.flow import PillarCurve
from fluxflow_train.models.text import TextEncoder
from fluxflow_train.models.text_scratch import ScratchBackbone

Command = Callable[..., Any]


def watched(net: nn.Module, *inputs: Any) -> tuple[dict[str, Any], Watch]:
    """The entries of the activations of `net`, by name, after a forward for each of `inputs`."""
    watch = Watch({"net": net}, with_samples=True)
    for x in inputs:
        net(x)
    watch.remove()
    return {entry["name"].removeprefix("net").lstrip("."): entry for entry in measure(watch.layers)}, watch


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Captions(nn.Module):
    """A text encoder on its own backbone."""

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        ids, mask = given
        return self.text(self.text.backbone(ids, mask), mask).tokens


# ---- one layer ----


@pytest.mark.parametrize("bias", [-1e3, -30.0])
@pytest.mark.parametrize("name", ["relu", "silu", "gelu"])
def test_a_unit_that_never_opens_is_dead(name: str, bias: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), arm(name, 8))
    with torch.no_grad():
        net[0].bias[5] = bias
    entries, _ = watched(net, noise(4, 3, 9, 9))
    assert entries["1"]["dead"] == 1 / 8
    assert entries["1"]["outside"] is None and entries["1"]["saturated"] is None


def test_a_curve_that_always_says_the_same_is_dead_however_large() -> None:
    x = noise(4, 5 * 6, 7, 7)
    x[:, 2::6] = 100.0  # the five inputs of channel 2
    entries, _ = watched(BezierActivation(), x)
    assert entries[""]["dead"] == pytest.approx(1 / 6, rel=1e-5)
    assert watched(arm("relu", 4), torch.full((2, 4, 3, 3), -1.0))[0][""]["dead"] == 1


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "silu", "none"])
def test_t_is_counted_outside_and_at_the_ends(function: Any, layout: Any) -> None:
    x = noise(3, 5 * 4, 6, 5, scale=3)
    entries, _ = watched(BezierActivation(function, layout=layout), x.contiguous(memory_format=torch.channels_last))
    raw = x[:, :4] if layout == "planar" else x[:, ::5]
    t = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": nn.functional.silu, "none": nn.Identity()}[function](raw)
    values = t.flatten().tolist()
    outside = sum(v < 0 or v > 1 for v in values) / len(values)
    flat = {
        "sigmoid": [v < 0.01 or v > 0.99 for v in values],
        "tanh": [abs(v) > 0.98 for v in values],
    }.get(function)
    assert (outside == 0) == (function == "sigmoid")
    assert entries[""]["outside"] == pytest.approx(outside, abs=1e-6)
    assert entries[""]["saturated"] == (None if flat is None else pytest.approx(sum(flat) / len(flat), abs=1e-6))


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_curve_of_a_pillar_block(layout: Any) -> None:
    t, points = noise(2, 7, 10, scale=4), noise(4, 2, 7, 10)
    module = PillarCurve(layout)
    watch = Watch({"flow": module}, with_samples=True)
    y = module(t, points)
    watch.remove()
    (entry,) = measure(watch.layers)
    read = torch.sigmoid(t if layout == "planar" else torch.cat([t, *points], dim=-1)[..., 0::5])
    assert entry["saturated"] == pytest.approx(((read < 0.01) | (read > 0.99)).double().mean().item(), rel=1e-5)
    assert entry["variance"] == pytest.approx(y.flatten(0, 1).var(0, correction=0).mean().item(), rel=1e-5)
    assert entry["kind"] == "pillars"


@pytest.mark.parametrize("name", ARM_NAMES)
def test_every_arm_has_the_same_entries(name: str) -> None:
    function: Any = arm(name, 6)
    net = nn.Sequential(nn.Conv2d(3, 6 * function.expansion, 1), function)
    x = noise(2, 3, 5, 5)
    y = net(x).movedim(1, -1).flatten(0, -2).double()
    entries, _ = watched(net, x)
    assert entries["1"]["kind"] == name and entries["1"]["depth"] == 0
    assert entries["1"]["variance"] == pytest.approx(y.var(0, correction=0).mean().item(), rel=1e-4)
    assert (entries["1"]["outside"] is not None) == name.startswith(("bezier", "bernstein"))
    assert (entries["1"]["saturated"] is not None) == name.startswith(("bezier", "bernstein", "gate5"))


def test_half_precision_is_measured_in_single() -> None:
    x = noise(4, 20, 8, 8)
    low, _ = watched(BezierActivation(), x.bfloat16())
    full, _ = watched(BezierActivation(), x)
    assert low[""]["variance"] == pytest.approx(full[""]["variance"], rel=0.02)


def test_parts_of_a_batch_count_as_the_batch() -> None:
    x = noise(6, 20, 4, 4)
    x[:4] += 1
    whole, parts = (watched(BezierActivation("tanh"), *given)[0][""] for given in ([x], [x[:4], x[4:]]))
    for name in ("dead", "outside", "saturated", "variance"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_padding_of_texts_is_left_out() -> None:
    torch.manual_seed(0)
    text = TextEncoder(ScratchBackbone(16, 1, 2, 16, "relu"), 24, 16, "bezier")
    ids, mask = text.backbone.tokenize(["a", "a red circle"])
    entries, _ = watched(Captions(text), (ids, mask))
    hidden = [text.backbone(ids[i, None, :n], mask[i, None, :n])[0] for i, n in enumerate(mask.sum(1))]
    y = text.projection[:3](torch.cat(hidden))
    assert entries["text.projection.2"]["variance"] == pytest.approx(y.var(0, correction=0).mean().item(), rel=1e-4)
    assert entries["text.backbone.blocks.0.feed_forward.1"]["kind"] == "relu"


def test_density_counts_points_on_the_curve() -> None:
    _, watch = watched(BezierActivation(gain=2.5), noise(2, 30, 16, 16))
    (found,) = densities(watch.layers)
    counts = np.array(found["counts"])
    assert counts.shape == (24, 24) and counts.sum() == 2 * 6 * 256
    layer = next(iter(watch.layers.values()))
    assert layer.sample is not None
    assert found["y_edges"][-1] == pytest.approx(layer.sample[1].max().item() / 2.5, rel=1e-5)


def test_densities_are_few_and_spread_over_depth() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 10, 1), arm("bezier", 2)) for _ in range(20)))
    _, watch = watched(net, noise(1, 2, 4, 4))
    depths = [found["depth"] for found in densities(watch.layers)]
    assert len(depths) == 8 and depths[0] == 0 and depths[-1] == 19


def test_values_that_are_not_finite_are_none() -> None:
    net = nn.Sequential(nn.Conv2d(2, 10, 1), arm("bezier", 2))
    x = noise(1, 2, 4, 4)
    x[0, 0, 0, 0] = math.nan
    entries, watch = watched(net, x)
    assert entries["1"]["variance"] is None
    json.dumps([summary(list(entries.values())), densities(watch.layers)], allow_nan=False)


def test_gradient_norms_are_those_of_what_feeds_the_layer() -> None:
    net = nn.Sequential(
        nn.GroupNorm(2, 4), nn.Conv2d(4, 15, 1), arm("bezier", 3), nn.Conv2d(3, 2, 1), TrainableBezier(2, (0, 1, 2, 4))
    )
    watch = Watch({"net": net}, with_samples=False)
    x = noise(4, 4, 5, 5)
    for part in x.split(2):
        net(part).square().mean().div(2).backward()
        watch.read_gradients()
    watch.remove()
    gradients = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    expected = [torch.cat([g.flatten() for g in part]).norm().item() for part in (gradients[:4], gradients[4:])]
    assert [entry["grad_norm"] for entry in measure(watch.layers)] == pytest.approx(expected, rel=1e-4)


def test_spread_is_in_powers_of_ten() -> None:
    entry = {"kind": "relu", "dead": 0.0, "outside": None, "saturated": None, "variance": 1.0}
    values = summary([entry | {"grad_norm": norm} for norm in (None, 0.01, 10.0)])
    assert values["grad_norm_spread"] == pytest.approx(3)
    assert values["outside"] is None and values["variance_last"] == 1
    heads = entry | {"kind": "trainable_bezier", "dead": 1.0, "grad_norm": None}
    assert summary([entry | {"grad_norm": 1.0}, heads])["dead"] == 0  # the same for all arms
    assert summary([entry | {"grad_norm": norm} for norm in (0.0, 10.0)])["grad_norm_spread"] == pytest.approx(12)


# ---- when it looks ----


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_hooks_stand_for_a_batch_that_is_due_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), arm("relu", 4))
    recorded: list[int] = []
    task: Any = SimpleNamespace(
        images_seen=0, ema_modules=lambda: {"net": net}, record=lambda values: recorded.append(task.images_seen)
    )
    trainer: Any = SimpleNamespace(is_global_zero=True, world_size=2)
    health = Health(str(tmp_path), budget_images=64, share=0.25)
    standing = []
    for number in range(10):
        health.on_train_batch_start(trainer, task, {"index": torch.zeros(3)}, number)
        standing.append(hooks(net) > 0)
        net(noise(2, 2, 3, 3)).sum().backward()
        health.on_after_backward(trainer, task)
        task.images_seen += 6
        health.on_train_batch_end(trainer, task)
        assert hooks(net) == 0
    assert [6 * (i + 1) for i, stands in enumerate(standing) if stands] == recorded
    task.images_seen = 60
    health.on_train_batch_start(trainer, task, {"index": torch.zeros(3)}, 10)
    assert hooks(net) > 0  # the last batch, though no quarter ends in it
    health.on_exception(trainer, task, KeyboardInterrupt())
    assert hooks(net) == 0
    assert json.loads((tmp_path / "health.json").read_text())["history"]["images"] == recorded


# ---- in runs ----


@pytest.fixture
def vae_options(small: tuple[str, ...], data_root: Path) -> tuple[str, ...]:
    return ("+experiment=vae_bezier", *small, f"data.root={data_root}", "evaluate.split=null", "budget.images=40")


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_vae_trains_the_same_without_and_again_from_where_it_stopped(
    vae_options: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    options = (*vae_options, "callbacks.health.share=0.3", "gan=patch")
    assert command("fluxflow_train", *options, f"run={tmp_path / 'with'}").code == 0
    assert command("fluxflow_train", *options, "~callbacks.health", f"run={tmp_path / 'without'}").code == 0
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "health.json").exists()

    stopped = (*options, f"run={tmp_path / 'stopped'}")
    for _ in range(2):
        assert command("fluxflow_train", *stopped, "budget.hours=1e-6").code == 85
    assert command("fluxflow_train", *stopped).code == 0
    assert (tmp_path / "stopped" / "health.json").read_bytes() == (tmp_path / "with" / "health.json").read_bytes()
    assert json.loads((tmp_path / "with" / "health.json").read_text())["history"]["images"] == [12, 24, 36, 40]


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_together_have_the_norm_that_the_guard_sees(
    parts: int, vae_options: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    options = (*vae_options, "scale.log_every=4", f"task.num_micro_batches={parts}", "task.clip_norm=1e-3")
    assert command("fluxflow_train", *options, f"run={tmp_path / 'run'}").code == 0
    health = json.loads((tmp_path / "run" / "health.json").read_text())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    expected = [float(row["train/grad_norm"]) for row in rows if row["train/grad_norm"]][-1]
    assert health["images_seen"] == 40
    assert math.hypot(*(layer["grad_norm"] for layer in health["layers"])) == pytest.approx(expected, rel=1e-4)
    assert [layer["depth"] for layer in health["layers"]] == list(range(len(health["layers"])))
    assert [curve["name"] for curve in health["curves"]] == [
        "vae.encoder.mu_curve",
        "vae.encoder.logvar_curve",
        "vae.decoder.rgb",
    ]
    (last,) = (
        {k: float(v) for k, v in row.items() if k.startswith("health/") and v}
        for row in rows
        if row["images_seen"] == "40" and row["health/dead"]
    )
    ending = {f"health/{k}": v[-1] for k, v in health["history"].items() if k != "images"}
    assert last == pytest.approx(ending, rel=1e-8)


def test_flow_trains_the_same_without(
    flow_options: tuple[str, ...], frozen_text: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    options = ("+experiment=flow_bezier", *flow_options, *frozen_text)
    assert command("fluxflow_train", *options, f"run={tmp_path / 'with'}").code == 0
    assert command("fluxflow_train", *options, "~callbacks.health", f"run={tmp_path / 'without'}").code == 0
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    health = json.loads((tmp_path / "with" / "health.json").read_text())
    kinds = [(layer["name"], layer["kind"]) for layer in health["layers"]]
    assert kinds == [
        ("text.projection.2", "bezier"),
        ("flow.blocks.0.curve", "pillars"),
        ("flow.blocks.1.curve", "pillars"),
    ]
    assert [found["name"] for found in health["densities"]] == [name for name, _ in kinds]
