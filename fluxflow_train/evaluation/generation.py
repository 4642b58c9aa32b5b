"""A text-to-image model's pictures for a protocol's captions, at one guidance scale, by THE sampler.

B pictures of a chunk, F feature width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxflow_train import weights
from fluxflow_train.evaluation import showing
from fluxflow_train.evaluation.filling import discard_damaged, fill
from fluxflow_train.evaluation.images import Images
from fluxflow_train.evaluation.place import Place
from fluxflow_train.evaluation.reference import Need, Real
from fluxflow_train.evaluation.report import Measured, front, report_of
from fluxflow_train.evaluation.results import Findings, distances, means, merged
from fluxflow_train.evaluation.samples import PICTURES, keep_pictures, picture_digests
from fluxflow_train.generation import Request, Settings, refuse_untrained_null
from fluxflow_train.metrics.clip_score import ClipScore
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.pipeline import Pipeline
from fluxflow_train.reports import figures, flow
from fluxflow_train.reports.drawing import Artist
from fluxflow_train.reports.passes import is_constant, seconds


class Maker:
    """Makes the rows of a store; the noise of a picture comes from its number. PNGs of the first 64 go to `pictures`.

    The sampler's pictures do not depend on what else is asked for, so nothing depends on chunks or ranks.
    """

    def __init__(
        self, artist: Artist, images: Images, extractor: Extractor, clip: ClipScore | None, pictures: Path
    ) -> None:
        self.artist, self.images, self.extractor = artist, images, extractor
        self.clip, self.pictures = clip, pictures

    def __call__(self, chunks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
        for chunk in chunks:
            yield self.rows(chunk)

    def rows(self, chunk: range) -> dict[str, Tensor]:
        captions = self.images.captions(chunk)
        requests = [Request(caption, "", number) for number, caption in zip(chunk, captions, strict=True)]
        start = seconds(self.artist.device)
        made, is_broken = self.draw(requests)
        elapsed = seconds(self.artist.device) - start
        # Which of them it was is asked only where one is: one by one they are slower.
        broken = [is_broken and self.draw([request])[1] for request in requests]
        keep_pictures(self.pictures, chunk, made)
        on_device = made.to(self.artist.device)
        rows = {
            "features": self.extractor(on_device).cpu(),
            "nonfinite": torch.tensor(broken),
            "constant": is_constant(made),
            "sha256": picture_digests(made),
            "seconds": torch.full((len(made),), elapsed / len(made), dtype=torch.float64),
        }
        if self.clip is not None:
            rows["clip_score"] = self.clip(on_device, captions).cpu().double()
        return rows

    def draw(self, requests: list[Request]) -> tuple[Tensor, bool]:
        """uint8 (B, 3, H, W), and whether any output of the networks held NaN or Inf."""
        self.artist.nonfinite.clear()
        with self.artist.watched():
            made = self.artist.draw(requests, lambda _: None)
        return made, any(int(count) for count in self.artist.nonfinite)


class Drawings:
    """An evaluation of a text-to-image model: what it needs, a store for each guidance scale, its report."""

    def __init__(self, model: TextToImage, description: dict[str, Any], place: Place, run_dir: Path) -> None:
        """
        Raises:
            UserError: no picture can be made so, or the model never learned what is asked.
        """
        options = place.options
        self.place, self.run_dir, self.description = place, run_dir, description
        self.model = model.to(place.device)
        self.objective = weights.build(description["objective"])
        pipeline = Pipeline(self.model, self.objective, description)
        resolution = place.images.resolution
        settings = pipeline.settings(
            seed=options.seed, solver=options.solver, steps=options.steps, height=resolution, width=resolution
        )
        self.scales = options.guidance or (settings.guidance.scale,)
        self.settings = {
            scale: replace(settings, guidance=settings.guidance._replace(scale=scale)) for scale in self.scales
        }
        captions = place.images.captions(range(place.count))
        for each in self.settings.values():
            refuse_untrained_null(description["cfg_dropout_prob"], each.guidance, captions)
        self.objective.scheduler(settings.solver, settings.steps)  # there may be no such solver
        self.clip = None if options.clip is None else ClipScore(options.clip).to(place.device)
        self.key = place.key(description["sha256"], self.sampling(settings))

    def sampling(self, settings: Settings) -> dict[str, Any]:
        return {
            "solver": settings.solver,
            "steps": settings.steps,
            "guidance": list(self.scales),
            "size": [settings.height, settings.width],
            "clip": None if self.clip is None else self.clip.weights_sha256,
        }

    def artist(self, scale: float) -> Artist:
        return Artist(self.model, self.objective, self.settings[scale], self.place.device)

    def needs(self) -> list[Need]:
        """Real images whose features must be there first: the whole reference."""
        return self.place.needs(len(self.place.reference_images))

    def fill(self, folder: Path) -> None:
        place = self.place
        for scale in self.scales:
            name = name_of(scale)
            store = place.store(folder, name, self.key)
            make = Maker(self.artist(scale), place.images, place.extractor, self.clip, folder / PICTURES / name)
            place.ranks.first(lambda store=store: discard_damaged(store, place.count))
            fill(store, place.count, place.ranks, make, f"draw, guidance {scale:g}")

    def report(self, folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
        place = self.place
        real = place.real(len(place.reference_images))
        measured = [self.measured(folder, scale, real) for scale in self.scales]
        setting, head = place.setting(real.reference), self.scales[0]
        pictures, drawn = folder / PICTURES / name_of(head), measured[0].rows["features"]
        shown = {
            **front(setting, measured),
            "curves": figures.training_curves(self.run_dir / "metrics.csv"),
            "bezier": showing.flow_curves(self.artist(head), place.images),
            "captioned": showing.captioned(place.images, pictures, place.count),
            "neighbours": showing.neighbours(place.images, pictures, drawn, real.train, place.extractor, place.device)
            if place.protocol.train_split is not None
            else [],
            "neighbour_unit": "",
            "triples": [],
        }
        sampling = {key: self.description[key] for key in ("objective", "sampler", "cfg_dropout_prob")}
        model = flow.describe(self.artist(head), sampling) | {"sampling": self.sampling(self.settings[head])}
        provenance = {**provenance, "warnings": self.warnings()}
        return report_of(setting, measured, model | provenance.get("model", {}), provenance, shown)

    def warnings(self) -> list[str]:
        trained, drawn = self.description["sampler"]["resolution"], self.place.images.resolution
        return [] if trained == drawn else [f"trained at {trained} px, the model drew at the protocol's {drawn} px"]

    def measured(self, folder: Path, scale: float, real: Real) -> Measured:
        """The numbers of one guidance scale."""
        place = self.place
        rows, fingerprint = place.read(folder, name_of(scale), self.key)
        found = distances(place.extractor, real, rows["features"], place.options.seed)
        return Measured(scale, rows, fingerprint, merged([found, Findings(means(rows))]))


def name_of(scale: float) -> str:
    return f"guidance-{scale:g}"
