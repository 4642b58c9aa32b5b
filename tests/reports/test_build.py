import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fluxflow_train import rng
from fluxflow_train.metrics import features
from fluxflow_train.reports.build import evaluate_vae, write_report

SECTIONS = {
    *("schema", "status", "results", "protocol", "reference", "samples", "extractor", "estimator", "model"),
    *("environment", "checks", "cost", "warnings", "figures"),
}
needs_extractor = pytest.mark.skipif(not features.available(), reason="needs the demo extra")


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in report["results"]}


def test_the_schema(report: dict[str, Any]) -> None:
    assert report["schema"] == "fid_report/v1"
    assert set(report) >= SECTIONS
    names = [r["name"] for r in report["results"]]
    assert len(names) == len(set(names))
    for result in report["results"]:
        assert {"name", "value", "raw", "n_real", "n_fake", "unit", "interval", "interval_method"} <= set(result)
        assert result["value"] == pytest.approx(result["raw"], rel=1e-5)
        assert result["interval"] is None or result["interval"][0] <= result["interval"][1]
    plain = {"psnr", "psnr_sampled", "psnr_nonwhite", "ssim", "rate_nats", "psnr_pca", "psnr_white"}
    cost = {"psnr_nonwhite_pca", "psnr_nonwhite_white", "images_per_second", "peak_memory", "parameters"}
    assert plain | cost <= set(names)
    assert "fid" not in names
    json.dumps(report, allow_nan=False)


@needs_extractor
def test_feature_distances_have_their_own_names(report: dict[str, Any]) -> None:
    results = by_name(report)
    for name in ("paired_distance_efficientnet_lite0", "kid_efficientnet_lite0"):
        assert results[name]["n_real"] == 66
        assert results[f"{name}_pca"]["baseline_of"] == name
    assert not any(name.startswith("frechet") for name in results)
    assert any("no Frechet distance" in w for w in report["warnings"])
    assert len(report["extractor"]["weights_sha256"]) == 64
    assert report["status"] == "final" and all(c["passed"] for c in report["checks"])


def test_psnr_is_that_of_numpy_on_the_posterior_mean(
    data: Any, vae: nn.Module, tmp_path: Path, without_extractor: None
) -> None:
    report = evaluate_vae(vae, data, tmp_path, device="cpu", seed=5, provenance={"command": "x"})
    image = data.parts["test"]
    values: dict[str, list[float]] = {"psnr": [], "psnr_sampled": []}
    for i in range(len(image)):
        x = image[i : i + 1].float() / 127.5 - 1
        noise = torch.from_numpy(rng.generator(5, "eval-eps", i).standard_normal((1, 8, 4, 4), dtype=np.float32))
        for name, eps in (("psnr", torch.zeros_like(noise)), ("psnr_sampled", noise)):
            with torch.no_grad():
                y = vae(x, eps).x_hat.double().numpy()
            y = np.floor(np.clip((y + 1) / 2 * 255 + 0.5, 0, 255))
            values[name].append(10 * math.log10(255**2 / np.mean((y - image[i : i + 1].numpy()) ** 2.0)))
    for name, expected in values.items():
        assert by_name(report)[name]["raw"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_results_do_not_depend_on_the_batch_size(evaluate: Any, without_extractor: None) -> None:
    small, large = by_name(evaluate(20, 12, 5)), by_name(evaluate(20, 12, 12))
    for name in small.keys() - {"images_per_second", "peak_memory"}:
        assert small[name]["raw"] == pytest.approx(large[name]["raw"], abs=1e-3), name


def test_status_names_what_is_missing(evaluate: Any, without_extractor: None) -> None:
    report = evaluate(20, 12)
    assert report["status"] == "partial"
    assert any("only 12 images" in r for r in report["status_reasons"])
    assert any("pip install" in w for w in report["warnings"])
    assert report["extractor"] is None


def test_an_untrained_or_broken_model_is_no_result(evaluate: Any, vae: Any, without_extractor: None) -> None:
    assert evaluate(20, 12, model={"images_seen": 0})["status"] == "smoke"
    nn.init.constant_(vae.decoder.rgb_conv.bias, math.nan)
    report = evaluate(20, 12, vae=vae)
    assert report["status"] == "smoke"
    assert any("finite outputs" in r for r in report["status_reasons"])
    json.dumps(report, allow_nan=False)


def test_a_collapsed_model_fails_its_check(evaluate: Any, vae: Any, without_extractor: None) -> None:
    nn.init.zeros_(vae.decoder.rgb_conv.weight)
    checks = {c["name"]: c["passed"] for c in evaluate(20, 12, vae=vae)["checks"]}
    assert not checks["no constant outputs"] and checks["finite outputs"]


def test_a_lost_image_is_noticed(data: Any, vae: nn.Module, tmp_path: Path, without_extractor: None) -> None:
    whole = data.num_samples
    data.num_samples = lambda split: whole(split) + (split == "test")
    report = evaluate_vae(vae, data, tmp_path, device="cpu", seed=0, provenance={"command": "x"})
    assert report["status"] == "smoke" and report["samples"]["synced"] == 10


def test_the_protocol_hash_covers_what_matters(evaluate: Any, report: dict[str, Any], without_extractor: None) -> None:
    protocol = evaluate(20, 12)["protocol"]
    assert protocol == report["protocol"] and len(protocol["hash"]) == 64


def test_the_model_keeps_its_mode_and_weights(
    data: Any, vae: nn.Module, tmp_path: Path, without_extractor: None
) -> None:
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    evaluate_vae(vae.train(), data, tmp_path, device="cpu", seed=0, provenance={"command": "x"})
    assert vae.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_files_are_written_whole(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    write_report(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_a_failed_write_leaves_the_old_report(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(ValueError):
        write_report(report | {"cost": {"seconds": math.nan}}, tmp_path)
    assert (tmp_path / "report.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
