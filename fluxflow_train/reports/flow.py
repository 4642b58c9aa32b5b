"""Measure a trained text-to-image model on the captions of a split: one dictionary (schema fid_report/v1).

N captions of the split, D latent channels, h w latent grid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxflow_train import weights
from fluxflow_train.data.sources import Split
from fluxflow_train.errors import UserError
from fluxflow_train.generation import Request, evaluating, generate, latent_shape
from fluxflow_train.metrics import features
from fluxflow_train.metrics.extractor import state_sha256
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import Objective
from fluxflow_train.reports import figures, flow_figures, flow_results, protocol
from fluxflow_train.reports.build import SCHEMA
from fluxflow_train.reports.checks import run_drawing_checks, status_of
from fluxflow_train.reports.drawing import Artist, Drawn, draw_all, reported_settings
from fluxflow_train.reports.passes import TRAIN_POOL, EvaluationData
from fluxflow_train.reports.progress import clock, progress
from fluxflow_train.reports.real_images import (
    MAX_IMAGES,
    Describe,
    SplitImages,
    TrainImages,
    by_extractor,
    by_pixels,
    distances,
    read_split_images,
    read_train_images,
)
from fluxflow_train.reports.results import memory_result

NUM_SHOWN = 8


class Evidence:
    """What drawing and reading left behind."""

    def __init__(
        self,
        artist: Artist,
        data: EvaluationData,
        split: Split,
        guided: bool,
        extractor: features.EfficientNetLite0 | None,
        device: torch.device,
        sweep: Sequence[float],
    ):
        """Draw, then describe what was drawn and what is real. `sets` by name, `swept` by scale are features (N, F)."""
        self.cost: dict[str, float] = {}
        seed = artist.settings.seed
        describe: Describe = by_pixels if extractor is None else by_extractor(extractor, device)
        self.num_train, self.num_tune = data.num_samples("train"), data.num_samples("tune")
        self.real: SplitImages = read_split_images(data, split, captionless=guided)
        self.expected = min(data.num_samples(split) - self.real.num_captionless, MAX_IMAGES)
        protocol.forget_peak_memory(device)
        with clock(self.cost, "seconds_draw"):
            self.drawn: Drawn = draw_all(artist, self.real.captions, guided, sweep)
        self.memory = protocol.peak_memory_mib(device)
        count = len(self.real.images)
        pictures = {
            "real": self.real.images,
            "drawn": self.drawn.images,
            "reconstruction": artist.reconstruct(self.real.images),
            "noise": artist.decode_noise(count),
        }
        total = (len(pictures) + len(sweep)) * count
        with clock(self.cost, "seconds_features"), progress("describe", total) as advance:

            def described(images: Tensor) -> Tensor:
                found = describe(images)
                advance(count)
                return found

            self.sets = {name: described(images) for name, images in pictures.items()}
            self.swept = {scale: described(images) for scale, images in self.drawn.swept.items()}
        pool = min(self.num_train, TRAIN_POOL)
        with clock(self.cost, "seconds_read_train"), progress("read train", pool) as advance:
            self.train: TrainImages = read_train_images(data, seed, describe, self.sets["drawn"][:NUM_SHOWN], advance)


def evaluate_flow(
    model: TextToImage,
    data: EvaluationData,
    run_dir: Path,
    *,
    split: Split = "test",
    device: torch.device | str,
    seed: int,
    provenance: dict[str, Any],
    guidance_scales: Sequence[float] = (),
) -> dict[str, Any]:
    """The report on `model`, drawn by THE sampler as the model recommends, in fp32, on one process.

    Args:
        run_dir: where `metrics.csv` and `samples/` are read from; nothing is written (see `write_report`).
        provenance: as for `evaluate_vae`, and "sampling": {"objective": its description, "sampler": {solver, steps,
            guidance, micro_batch, resolution}, "cfg_dropout_prob"}.
        guidance_scales: at which all captions are drawn too, for their distances alone.

    Raises:
        UserError: the split has no captions, and the model cannot draw without; or it never learned the null condition
            that another scale than 1 needs.
    """
    device = torch.device(device)
    sampling = provenance["sampling"]
    guided = sampling["cfg_dropout_prob"] > 0
    sweep = scales_of(guidance_scales, guided)
    objective: Objective = weights.build(sampling["objective"])
    settings = reported_settings(sampling, seed)
    extractor = features.EfficientNetLite0().to(device) if features.available() else None
    if sweep and extractor is None:
        raise UserError(f"guidance_scales are compared by features, and there is no extractor: {features.REMEDY}")
    artist = Artist(model.to(device), objective, settings, device)
    with evaluating(model):
        evidence = Evidence(artist, data, split, guided, extractor, device, sweep)
        return report_of(artist, evidence, run_dir, split, extractor, provenance)


def scales_of(given: Sequence[float], guided: bool) -> tuple[float, ...]:
    """Raises UserError for what are no guidance scales, or none that the model can draw at."""
    if not all(isinstance(scale, int | float) and not isinstance(scale, bool) for scale in given):
        raise UserError(f"guidance_scales={list(given)} must be numbers: guidance_scales=[1,3,5]")
    scales = tuple(dict.fromkeys(map(float, given)))
    if not guided and set(scales) - {1.0}:
        raise UserError("guidance_scales other than 1 need a model trained with task.cfg_dropout_prob above 0")
    return scales


def report_of(
    artist: Artist,
    evidence: Evidence,
    run_dir: Path,
    split: Split,
    extractor: features.EfficientNetLite0 | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The dictionary that becomes `report.json`."""
    settings, real, drawn, train = artist.settings, evidence.real, evidence.drawn, evidence.train.features
    model = describe(artist, provenance["sampling"]) | provenance.get("model", {})
    curves = figures.training_curves(run_dir / "metrics.csv")
    results, estimator, warnings = all_results(artist, evidence, curves, extractor, model)
    checks = run_drawing_checks(
        drawn, real.indices, evidence.expected, evidence.sets["real"] if extractor is not None else None
    )
    missing = [] if "val/loss" in curves else ["no validation loss in metrics.csv"]
    status, reasons = status_of(checks, model, len(drawn.images), extractor is not None, missing)
    reference = {"split": split, "images": len(real.images), "keys_sha256": protocol.digest(real.keys)}
    return {
        "schema": SCHEMA,
        "kind": "text-to-image",
        "status": status,
        "status_reasons": reasons,
        "command": provenance["command"],
        "results": results,
        "sweep": [
            {"guidance": scale, "results": flow_results.swept_results(evidence.sets["real"], x, train, settings.seed)}
            for scale, x in evidence.swept.items()
        ],
        "protocol": protocol.flow_protocol(split, settings, len(drawn.images)),
        "reference": reference
        | {"training_images": len(train), "of_training_images": evidence.num_train}
        | provenance.get("reference", {}),
        "samples": {
            "expected": evidence.expected,
            "drawn": len(drawn.images),
            "unique": len({image.numpy().tobytes() for image in drawn.images}),
            "prompts_sha256": protocol.digest(real.captions),
            "seed": settings.seed,
            "seed_rule": "noise from (seed, 'sample-noise', number of the image); prompts of the grids from "
            "(seed, 'report-prompts'); training images from (seed, 'train-draw')",
        },
        "extractor": extractor.describe() if extractor is not None else None,
        "estimator": estimator,
        "model": model,
        "environment": protocol.environment(artist.device) | provenance.get("environment", {}),
        "checks": checks,
        "cost": evidence.cost | provenance.get("cost", {}),
        "warnings": warnings,
        "figures": draw_figures(artist, evidence, run_dir, curves, "" if extractor is not None else "grey levels"),
    }


def all_results(
    artist: Artist,
    evidence: Evidence,
    curves: dict[str, Any],
    extractor: features.EfficientNetLite0 | None,
    model: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Results; how they were estimated; warnings."""
    settings, drawn, sets, train = artist.settings, evidence.drawn, evidence.sets, evidence.train.features
    zero = flow_results.zero_loss(artist.objective, artist.encode(evidence.real.images), settings.seed)
    results = flow_results.loss_results(curves, evidence.num_tune, zero, model.get("images_seen"))
    estimator: dict[str, Any] = {"loss": "mean over the split tune, each image at a stratum of t of its own"}
    warnings = []
    if evidence.real.num_captionless:
        warnings.append(f"{evidence.real.num_captionless} images without a caption were left out")
    if extractor is None:
        warnings.append(f"no feature distances: the extractor is not installed ({features.REMEDY})")
    elif len(drawn.images) >= 2 and len(train) >= 2:
        kid, doubts = flow_results.kid_results(sets, train, settings.seed)
        frechet, how, more_doubts = flow_results.frechet_results(sets, train)
        results += kid + frechet
        estimator |= {"kid": "unbiased U-statistic, cubic kernel, pairs of the same caption left out", **how}
        warnings += doubts + more_doubts
    results += flow_results.nearest_results(
        sets["drawn"], sets["real"], train, "grey levels" if extractor is None else ""
    )
    results += flow_results.caption_results(drawn.by_noise)
    how_drawn = f"{settings.solver}, {settings.steps} steps, guidance {settings.guidance.scale:g}, fp32"
    results += flow_results.cost_results(artist.model, drawn.seconds / len(drawn.images), len(drawn.images), how_drawn)
    if evidence.memory is not None:
        results.append(memory_result(evidence.memory, artist.device, "pictures", "its last picture"))
    return results, estimator, warnings


def describe(artist: Artist, sampling: dict[str, Any]) -> dict[str, Any]:
    """What the modules themselves tell."""
    model, settings = artist.model, artist.settings
    return {
        "class": type(model).__name__,
        "components": {name: type(part).__name__ for name, part in model.named_children()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "latent_shape": list(latent_shape(model, settings)),
        "weights_sha256": state_sha256(model.state_dict()),
        "objective": sampling["objective"],
        "sampler": sampling["sampler"],
        "cfg_dropout_prob": sampling["cfg_dropout_prob"],
    }


def draw_figures(
    artist: Artist, evidence: Evidence, run_dir: Path, curves: dict[str, Any], unit: str
) -> dict[str, Any]:
    """Curves as numbers, pictures as PNG."""
    drawn, real = evidence.drawn, evidence.real
    real_nearest = distances(evidence.sets["real"][:NUM_SHOWN], evidence.train.features).amin(1).tolist()
    request = [Request(drawn.prompts[0], "", 0)]

    def one_picture() -> None:
        generate(artist.model, artist.objective, request, artist.settings)

    return {
        "curves": curves,
        "bezier": [
            entry | {"name": f"{part}.{entry['name']}"}
            for part in ("text", "flow")
            for entry in figures.learned_curves(getattr(artist.model, part), one_picture)
        ],
        "captioned": flow_figures.captioned(drawn, real),
        "scales": drawn.scales,
        "by_scale": flow_figures.rows(drawn.prompts, drawn.by_scale),
        "by_noise": flow_figures.rows(drawn.prompts, drawn.by_noise),
        "neighbours": flow_figures.neighbours(drawn, real, evidence.train.nearest, real_nearest),
        "neighbour_unit": unit,
        "training_samples": flow_figures.training_samples(run_dir / "samples"),
    }
