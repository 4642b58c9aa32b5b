"""What `evaluate protocol=...` and `prepare reference=...` do: features first, by all ranks; then the numbers, by one.

N images of the evaluation, F feature width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fluxflow_train.data.sources import Source
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.generation import Drawings
from fluxflow_train.evaluation.place import Options, Place
from fluxflow_train.evaluation.protocol import Protocol
from fluxflow_train.evaluation.reconstruction import Reconstructions
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.ranks import placed, process_group
from fluxflow_train.reports.build import write_report
from fluxflow_train.reports.progress import clock
from fluxflow_train.weights import load_model

FOLDER = "evaluations"


def prepare_reference(
    protocol: Protocol,
    resolution: int,
    options: Options,
    *,
    own: Source | None,
    built: Extractor | None,
    root: Path,
) -> Path:
    """Make every feature of real images that the protocol asks for; its folder.

    Raises:
        UserError: data or weights are not at hand, or the folder holds something else.
    """
    with process_group() as ranks:
        place = Place(protocol, resolution, options, own, built, root, ranks)
        place.reference.prepare(place.needs(len(place.reference_images)), ranks)
        return place.reference.folder


def evaluate_run(
    run_dir: Path,
    protocol: Protocol,
    options: Options,
    *,
    own: Source | None,
    built: Extractor | None,
    root: Path,
    provenance: dict[str, Any],
) -> tuple[dict[str, Any], Path]:
    """Measure the exported weights in `run_dir`; the report, the same on every rank, and the folder that has it.

    Args:
        own: the run's own source of data.
        built: the extractor, where the protocol describes one of the user's.
        root: where shards and references are kept.
        provenance: "command", and what else the run knows, as for `reports.build.evaluate_vae`.

    Raises:
        UserError: one line for whatever the user can put right; what was computed until then is kept.
    """
    with process_group() as ranks:
        model, description = load_model(run_dir)
        place = Place(protocol, trained_resolution(description, provenance), options, own, built, root, ranks)
        subject = subject_of(model, description, place, run_dir)
        folder = run_dir / FOLDER / f"{place.protocol.id}-{subject.key[:8]}"
        cost: dict[str, float] = {}
        with clock(cost, "seconds_reference"):
            place.reference.ensure(subject.needs(), ranks)
        with clock(cost, "seconds_pictures"):
            subject.fill(folder)
        provenance = {**provenance, "cost": cost | provenance.get("cost", {})}

        def conclude() -> dict[str, Any]:
            with clock(cost, "seconds_statistics"):
                report = subject.report(folder, provenance)
            report["cost"] |= cost
            write_report(report, folder)
            return report

        return ranks.first(conclude), folder


def subject_of(
    model: nn.Module, description: dict[str, Any], place: Place, run_dir: Path
) -> Reconstructions | Drawings:
    """Raises UserError where the options are of the other kind of run."""
    options = place.options
    if isinstance(model, TextToImage):
        if options.lpips is not None:
            raise UserError("lpips is of reconstructions, and this is a text-to-image run: leave it out")
        return Drawings(model, description, place, run_dir)
    given = {"guidance": options.guidance, "solver": options.solver, "steps": options.steps, "clip": options.clip}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is of text-to-image runs, and {run_dir} is a VAE's: leave it out")
    if place.protocol.split != place.protocol.reference_split:
        raise UserError(
            f"protocol {place.protocol.id} is of text-to-image runs (a VAE is held against what went in): take one "
            "with the same split and reference_split, such as openmoji-test"
        )
    return Reconstructions(model, description, place, run_dir)


def trained_resolution(description: dict[str, Any], provenance: dict[str, Any]) -> int:
    return description.get("sampler", provenance)["resolution"]


def parse_guidance(given: Any) -> tuple[float, ...] | None:
    """One scale or several. Raises UserError for anything else, or a scale given twice."""
    if given is None:
        return None
    scales = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not scales or not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scales):
        raise UserError(f"guidance={given} must be a number or several: guidance=[1,3,5]")
    if len(set(scales)) != len(scales):
        raise UserError(f"guidance={given} names a scale twice: give each once")
    return tuple(float(s) for s in scales)


def is_first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return placed(dict(os.environ)).is_first
