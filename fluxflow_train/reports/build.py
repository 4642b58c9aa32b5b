"""Measure a trained VAE on a held-out split and put everything in one dictionary (schema fid_report/v1).

N images of the split, D latent channels, h w latent grid.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from fluxflow_train.metrics import features
from fluxflow_train.metrics.baselines import fit_pca
from fluxflow_train.reports import figures, page, protocol
from fluxflow_train.reports.checks import run_checks, status_of
from fluxflow_train.reports.distances import MAX_FLOOR, PROJECTION_IMAGES, feature_results
from fluxflow_train.reports.passes import TRAIN_POOL, EvaluationData, SplitPass, draw_train, read_split
from fluxflow_train.reports.results import cost_results, reconstruction_results

SCHEMA = "fid_report/v1"
NUM_EXAMPLES = 16


def evaluate_vae(
    vae: nn.Module,
    data: EvaluationData,
    run_dir: Path,
    *,
    split: str = "test",
    device: torch.device | str,
    seed: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The report on `vae` over the whole of `split`, in fp32, on one process; the module's mode is left as it was.

    Args:
        run_dir: where `metrics.csv` is read from; nothing is written (see `write_report`).
        provenance: what the run knows and the evaluation cannot see: "command" (str), and any of the dictionaries
            "model" (images_seen, checkpoint, ema, ...), "reference" (dataset, licence, manifest hash, ...),
            "environment" (git, ...) and "cost" (training seconds, ...), which are merged into the report's own.
    """
    device = torch.device(device)
    was_training = vae.training
    vae = vae.to(device).eval()
    try:
        return _evaluate(vae, data, run_dir, split, device, seed, provenance)
    finally:
        vae.train(was_training)


def _evaluate(
    vae: nn.Module,
    data: EvaluationData,
    run_dir: Path,
    split: str,
    device: torch.device,
    seed: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    started = time.perf_counter()
    extractor = features.EfficientNetLite0().to(device) if features.available() else None
    expected = data.num_samples(split)
    shape = next(iter(data.eval_dataloader(split)))["image"].shape[-2:]
    latent_shape = vae.latent_shape(*shape)  # type: ignore[operator]
    with progress("draw train", min(data.num_samples("train"), TRAIN_POOL)) as advance:
        train = draw_train(data, seed, PROJECTION_IMAGES + min(expected, MAX_FLOOR), extractor, device, advance)
    drawn = time.perf_counter()
    pca = fit_pca(train.images, latent_shape[0] * latent_shape[1] * latent_shape[2])
    fitted = time.perf_counter()
    with progress(f"measure {split}", expected) as advance:
        measured = read_split(vae, data, split, seed, NUM_EXAMPLES, pca, extractor, device, advance)
    read = time.perf_counter()
    results, estimator = reconstruction_results(measured, pca, len(train.images), shape)
    warnings: list[str] = []
    if extractor is None:
        warnings.append(f"no feature distances: the extractor is not installed ({features.REMEDY})")
    else:
        more, more_estimator, more_warnings = feature_results(measured, train.features, seed)
        results, estimator, warnings = results + more, estimator | more_estimator, warnings + more_warnings
    results += cost_results(vae, measured, device)
    checks = run_checks(measured, expected)
    model = describe(vae, latent_shape) | provenance.get("model", {})
    status, reasons = status_of(checks, model, expected, extractor is not None)
    finished = time.perf_counter()
    return {
        "schema": SCHEMA,
        "status": status,
        "status_reasons": reasons,
        "command": provenance.get("command", ""),
        "results": results,
        "protocol": protocol.vae_protocol(split, shape[0], shape[1], seed),
        "reference": {"split": split, "images": expected, "keys_sha256": protocol.digest(measured.keys)}
        | provenance.get("reference", {}),
        "samples": {
            "expected": expected,
            "synced": len(measured.indices),
            "unique": len(set(measured.indices)),
            "seed": seed,
            "seed_rule": "eps from (seed, 'eval-eps', index); examples from (seed, 'report-examples')",
        },
        "extractor": describe_extractor(extractor),
        "estimator": estimator,
        "model": model,
        "environment": protocol.environment(device) | provenance.get("environment", {}),
        "checks": checks,
        "cost": {
            "seconds_draw_train": round(drawn - started, 2),
            "seconds_fit_pca": round(fitted - drawn, 2),
            "seconds_measure": round(read - fitted, 2),
            "seconds_total": round(finished - started, 2),
        }
        | provenance.get("cost", {}),
        "warnings": warnings,
        "figures": draw_figures(vae, measured, run_dir, device),
    }


def describe(vae: nn.Module, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the module itself tells."""
    return {
        "class": type(vae).__name__,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent_shape": list(latent_shape),
        "weights_sha256": protocol.weights_digest(vae),
    }


def describe_extractor(extractor: features.EfficientNetLite0 | None) -> dict[str, Any] | None:
    """Everything that must agree before two feature distances are compared."""
    if extractor is None:
        return None
    return {
        "name": features.NAME,
        "class": type(extractor).__name__,
        "weights": extractor.weights_name,
        "weights_sha256": extractor.weights_sha256,
        "random": False,
        "resize": features.RESIZE,
        "dtype": "float32",
        "dimension": features.DIMENSION,
        "fingerprint": extractor.fingerprint(),
    }


def draw_figures(vae: nn.Module, measured: SplitPass, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Curves as numbers, pictures as PNG."""
    x = torch.stack([e.image for e in measured.examples]).to(device).float().div(127.5).sub(1)
    eps = torch.zeros(len(x), *vae.latent_shape(*x.shape[-2:]), device=device)  # type: ignore[operator]
    worst = [item for _, _, item in sorted(measured.worst, key=lambda entry: entry[2].psnr)]
    return {
        "curves": figures.training_curves(run_dir / "metrics.csv"),
        "bezier": figures.learned_curves(vae, x, eps),
        "examples": [figures.example(item) for item in measured.examples],
        "worst": [figures.example(item) for item in worst],
        "amplify": figures.AMPLIFY,
        "psnr_histogram": figures.histogram(measured.scores["model"].per_image("psnr")),
    }


@contextmanager
def progress(label: str, total: int) -> Iterator[Any]:
    """A bar on stderr, silent where that is no terminal; yields the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task: TaskID = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def write_report(report: dict[str, Any], run_dir: Path) -> None:
    """`report.json` and `report.html` in `run_dir`, each written whole under another name and then renamed."""
    write_atomic(run_dir / "report.json", json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    write_atomic(run_dir / "report.html", page.render(report))


def write_atomic(path: Path, text: str) -> None:
    """A reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
