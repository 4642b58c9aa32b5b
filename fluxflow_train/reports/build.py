"""Measure a trained VAE on a held-out split and put everything in one dictionary (schema fid_report/v1).

N images of the split, D latent channels, h w latent grid.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxflow_train.data.sources import Split
from fluxflow_train.files import write_atomically
from fluxflow_train.metrics import features
from fluxflow_train.metrics.baselines import PCA, fit_pca
from fluxflow_train.metrics.extractor import state_sha256
from fluxflow_train.pixels import dequantize
from fluxflow_train.reports import figures, markdown, page, protocol, schema
from fluxflow_train.reports.checks import run_checks, status_of
from fluxflow_train.reports.distances import MAX_FLOOR, PROJECTION_IMAGES, feature_results
from fluxflow_train.reports.passes import TRAIN_POOL, EvaluationData, SplitPass, TrainSample, draw_train, read_split
from fluxflow_train.reports.progress import clock, progress
from fluxflow_train.reports.results import cost_results, reconstruction_results

SCHEMA = "fid_report/v1"
NUM_EXAMPLES = 16


def evaluate_vae(
    vae: nn.Module,
    data: EvaluationData,
    run_dir: Path,
    *,
    split: Split = "test",
    device: torch.device | str,
    seed: int,
    provenance: dict[str, Any],
    with_features: bool = True,
) -> dict[str, Any]:
    """The report on `vae` over the whole of `split`, in fp32, on one process; the module's mode is left as it was.

    Args:
        run_dir: where `metrics.csv` is read from; nothing is written (see `write_report`).
        provenance: what the run knows and the evaluation cannot see: "command" (str), and where there is something to
            say the dictionaries "model" (experiment, images_seen, checkpoint, ema, ...), "reference" (dataset, licence,
            manifest hash, ...), "environment" (git, ...) and "cost" (seconds_training, ...), merged into the report's
            own; their values are plain JSON.
        with_features: measure feature distances, where their extractor is installed: most of a small report's time.
    """
    device = torch.device(device)
    was_training = vae.training
    vae = vae.to(device).eval()
    try:
        extractor = features.EfficientNetLite0().to(device) if with_features and features.available() else None
        evidence = measure(vae, data, split, device, seed, extractor)
        return report_of(vae, evidence, run_dir, split, device, seed, provenance, with_features)
    finally:
        vae.train(was_training)


@dataclass
class Evidence:
    """What the readings of the data left behind. `shape` (H, W); `memory` in MiB; `cost` in seconds, by phase."""

    expected: int
    shape: tuple[int, int]
    latent_shape: tuple[int, int, int]
    train: TrainSample
    pca: PCA
    measured: SplitPass
    extractor: features.EfficientNetLite0 | None
    memory: float | None
    cost: dict[str, float]


def measure(
    vae: nn.Module,
    data: EvaluationData,
    split: Split,
    device: torch.device,
    seed: int,
    extractor: features.EfficientNetLite0 | None,
) -> Evidence:
    """Draw training images, fit the PCA, reconstruct the split."""
    memory = memory_of_a_batch(vae, data, split, device)
    expected, num_train = data.num_samples(split), data.num_samples("train")
    num_features = PROJECTION_IMAGES + min(expected, MAX_FLOOR)
    cost: dict[str, float] = {}
    with clock(cost, "seconds_draw_train"), progress("draw train", min(num_train, TRAIN_POOL)) as advance:
        train = draw_train(data, seed, num_features, extractor, device, advance)
    height, width = train.images.shape[-2:]
    latent_shape = vae.latent_shape(height, width)  # type: ignore[operator]
    with clock(cost, "seconds_fit_pca"):
        pca = fit_pca(train.images, math.prod(latent_shape))
    with clock(cost, "seconds_measure"), progress(f"measure {split}", expected) as advance:
        measured = read_split(vae, data, split, seed, NUM_EXAMPLES, pca, extractor, device, advance)
    return Evidence(expected, (height, width), latent_shape, train, pca, measured, extractor, memory, cost)


@torch.inference_mode()
def memory_of_a_batch(vae: nn.Module, data: EvaluationData, split: Split, device: torch.device) -> float | None:
    """Peak memory in MiB after one batch, taken before the extractor and the baselines need theirs."""
    protocol.forget_peak_memory(device)
    x = dequantize(next(iter(data.eval_dataloader(split)))["image"].to(device))
    vae(x, torch.zeros(len(x), *vae.latent_shape(*x.shape[-2:]), device=device))  # type: ignore[operator]
    return protocol.peak_memory_mib(device)


def report_of(
    vae: nn.Module,
    evidence: Evidence,
    run_dir: Path,
    split: Split,
    device: torch.device,
    seed: int,
    provenance: dict[str, Any],
    with_features: bool,
) -> dict[str, Any]:
    """The dictionary that becomes `report.json`."""
    measured = evidence.measured
    results, estimator = reconstruction_results(measured, evidence.pca, len(evidence.train.images), evidence.shape)
    warnings: list[str] = []
    if evidence.extractor is None and with_features:
        warnings.append(f"no feature distances: the extractor is not installed ({features.REMEDY})")
    elif evidence.extractor is not None:
        more, more_estimator, warnings = feature_results(measured, evidence.train.features, seed)
        results, estimator = results + more, estimator | more_estimator
    results += cost_results(vae, measured, evidence.memory, device)
    checks = run_checks(measured, evidence.expected)
    model = describe(vae, evidence.latent_shape) | provenance.get("model", {})
    status, reasons = status_of(checks, model, evidence.expected, evidence.extractor is not None or not with_features)
    reference = {"split": split, "images": evidence.expected, "keys_sha256": protocol.digest(measured.keys)}
    return {
        "schema": SCHEMA,
        "kind": "reconstruction",
        "status": status,
        "status_reasons": reasons,
        "command": provenance["command"],
        "results": results,
        "protocol": protocol.vae_protocol(split, *evidence.shape, seed, with_features),
        "reference": reference | provenance.get("reference", {}),
        "samples": {
            "expected": evidence.expected,
            "synced": len(measured.indices),
            "unique": len(set(measured.indices)),
            "seed": seed,
            "seed_rule": "eps from (seed, 'eval-eps', index); examples from (seed, 'report-examples')",
        },
        "extractor": evidence.extractor.describe() if evidence.extractor is not None else None,
        "estimator": estimator,
        "model": model,
        "environment": protocol.environment(device) | provenance.get("environment", {}),
        "checks": checks,
        "cost": evidence.cost | provenance.get("cost", {}),
        "warnings": warnings,
        "figures": draw_figures(vae, measured, run_dir, device),
    }


def describe(vae: nn.Module, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the module itself tells."""
    return {
        "class": type(vae).__name__,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent_shape": list(latent_shape),
        "weights_sha256": state_sha256(vae.state_dict()),
    }


def draw_figures(vae: nn.Module, measured: SplitPass, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Curves as numbers, pictures as PNG."""
    x = dequantize(torch.stack([e.image for e in measured.examples]).to(device))
    eps = torch.zeros(len(x), *vae.latent_shape(*x.shape[-2:]), device=device)  # type: ignore[operator]
    worst = [item for _, _, item in sorted(measured.worst, key=lambda entry: entry[2].psnr)]
    return {
        "curves": figures.training_curves(run_dir / "metrics.csv"),
        "bezier": figures.learned_curves(vae, lambda: vae(x, eps)),
        "examples": [figures.example(item) for item in measured.examples],
        "worst": [figures.example(item) for item in worst],
        "amplify": figures.AMPLIFY,
        "psnr_histogram": figures.histogram(measured.scores["model"].per_image("psnr")),
    }


def write_report(report: dict[str, Any], run_dir: Path) -> None:
    """`report.json`, and `report.html` and `report.md` from it alone, in `run_dir`; each is replaced whole."""
    schema.check(report)
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    html = page.render(report)
    write_atomically(run_dir / "report.json", text.encode())
    write_atomically(run_dir / "report.html", html.encode())
    write_atomically(run_dir / "report.md", markdown.render(report).encode())
