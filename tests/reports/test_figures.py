import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxflow_train.models.bezier import TrainableBezier
from fluxflow_train.reports.figures import curve, histogram, picture, thin, training_curves
from fluxflow_train.reports.passes import NUM_WORST


def test_curves_of_a_metrics_file(report: dict[str, Any]) -> None:
    curves = report["figures"]["curves"]
    assert set(curves) == {"train/loss", "train/psnr", "val/psnr", "custom/thing"}
    assert curves["val/psnr"]["x"] == [3200.0 * i for i in range(1, 8)]
    assert len(curves["train/loss"]["x"]) == 300


def test_no_metrics_file_is_no_curves(tmp_path: Path) -> None:
    assert training_curves(tmp_path / "metrics.csv") == {}


def test_text_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("images_seen,train/loss\n1,nan\n2,0.5\n3,inf\n4,\n")
    assert training_curves(path)["train/loss"]["x"] == [2.0]


def test_thinning_keeps_the_mean_and_the_range() -> None:
    points = [(float(i), float(i % 7)) for i in range(3000)]
    thinned = thin(points)
    assert len(thinned["x"]) == 300
    assert np.mean(thinned["y"]) == pytest.approx(np.mean([y for _, y in points]), rel=1e-5)
    assert min(thinned["low"]) == 0 and max(thinned["high"]) == 6


def test_a_learned_curve_is_what_the_module_computes() -> None:
    module = TrainableBezier(5, (-1, -1 / 3, 1 / 3, 1))
    torch.nn.init.normal_(module.points, generator=torch.Generator().manual_seed(0))
    entry = curve("head", module.points)
    t = torch.tensor(entry["t"][1:-1], dtype=torch.float64)
    y = module(torch.logit(t)[:, None].expand(-1, 5)).detach()
    np.testing.assert_allclose(np.array(entry["values"])[:, 1:-1], y.T.numpy(), atol=1e-5)
    assert entry["num_channels"] == 5 and len(entry["points"]) == 5


def test_of_many_channels_sixteen_are_kept() -> None:
    entry = curve("wide", TrainableBezier(100, (0, 0, 0, 1)).points)
    assert len(entry["values"]) == 16 and entry["channels"][0] == 0 and entry["channels"][-1] == 99


def test_examples_are_seeded_distinct_and_the_worst_are_the_worst(report: dict[str, Any]) -> None:
    chosen = [e["index"] for e in report["figures"]["examples"]]
    assert len(set(chosen)) == 16
    worst = [e["psnr"] for e in report["figures"]["worst"]]
    assert len(worst) == NUM_WORST and worst == sorted(worst)
    assert worst[-1] <= min(e["psnr"] for e in report["figures"]["examples"] if e["psnr"] not in worst)


def test_t_of_every_head_is_counted(report: dict[str, Any]) -> None:
    entries = {e["name"]: e for e in report["figures"]["bezier"]}
    assert set(entries) == {"encoder.mu_curve", "encoder.logvar_curve", "decoder.rgb"}
    assert sum(entries["decoder.rgb"]["t_histogram"]) == 16 * 3 * 16 * 16


def test_pictures_are_png_and_large_ones_reduced() -> None:
    image = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    opened = Image.open(io.BytesIO(base64.b64decode(picture(image))))
    assert np.array_equal(np.array(opened), image.permute(1, 2, 0).numpy())
    large = Image.open(io.BytesIO(base64.b64decode(picture(torch.zeros(3, 512, 1024, dtype=torch.uint8)))))
    assert large.size == (256, 128)


def test_histogram_leaves_out_what_is_not_finite() -> None:
    assert sum(histogram([1.0, 2.0, float("inf"), float("nan")])["counts"]) == 2
