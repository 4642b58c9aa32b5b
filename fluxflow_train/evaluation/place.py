"""What an evaluation stands on, whatever the model: the protocol, the data and the extractor, opened and checked."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxflow_train.data.sources import Source
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation import protocol as protocols
from fluxflow_train.evaluation.extractors import ExtractorOptions, identity, open_extractor
from fluxflow_train.evaluation.images import Images, source_of
from fluxflow_train.evaluation.protocol import OWN, Protocol, digest
from fluxflow_train.evaluation.reference import MAX_TRAIN, Need, Real, RealFeatures, Reference, degraded, original
from fluxflow_train.evaluation.report import Setting
from fluxflow_train.evaluation.store import FeatureStore
from fluxflow_train.hardware import device_of
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.ranks import Ranks

FEATURES = "features"


@dataclass(frozen=True)
class Options:
    """What the command line chooses; None: the protocol's or the run's own."""

    num_images: int | None = None
    guidance: tuple[float, ...] | None = None
    solver: str | None = None
    steps: int | None = None
    seed: int = 0
    lpips: str | None = None
    clip: str | None = None
    num_workers: int = 0
    device: str = "auto"
    extractor: ExtractorOptions = field(default_factory=ExtractorOptions)


class Place:
    """Protocol, data and extractor, opened: all that does not depend on the model."""

    def __init__(
        self,
        protocol: Protocol,
        resolution: int,
        options: Options,
        own: Source | None,
        built: Extractor | None,
        root: Path,
        ranks: Ranks,
    ) -> None:
        """Raises UserError where something is not at hand; before anything is computed."""
        protocol = protocols.resolved(protocol, resolution)
        self.device = rank_device(options.device, ranks)
        self.options, self.ranks, self.root = options, ranks, root
        self.extractor = open_extractor(protocol, options.extractor, built, self.device)
        source = source_of(protocol, own, root)

        ranks.first(source.prepare)  # writes what the others then find

        def images_of(split: str) -> Images:
            return Images(source, split, int(protocol.resolution), root, options.num_workers)

        every = images_of(protocol.split)
        self.images = self.evaluated(protocol, every)
        self.reference_images = self.images
        if protocol.reference_split != protocol.split:
            self.reference_images = images_of(protocol.reference_split)
        self.train_images = self.reference_images
        if protocol.train_split not in (None, protocol.reference_split):
            self.train_images = images_of(protocol.train_split).first(MAX_TRAIN)
        if protocol.dataset == OWN:
            fingerprints = [each.selection.fingerprint for each in (self.images, self.reference_images)]
            protocol = replace(protocol, dataset=f"{type(source).__name__}-{digest(fingerprints)[:16]}")
        self.protocol = protocol
        self.count = self.requested(options.num_images)
        self.reference = Reference(protocol, self.extractor, self.device, root)

    def evaluated(self, protocol: Protocol, every: Images) -> Images:
        """The protocol's part of the split. Raises UserError where the split is smaller."""
        wanted = protocol.num_images
        if wanted is not None and wanted > len(every):
            raise UserError(
                f"protocol {protocol.id} is of {wanted:,} images, but {protocol.dataset} has {len(every):,} of split "
                f"{protocol.split}: complete the data in {self.root}, or lower num_images in a protocol of your own"
            )
        return every if wanted is None else every.first(wanted)

    def requested(self, wanted: int | None) -> int:
        """N. Raises UserError for more than there are."""
        if wanted is None:
            return len(self.images)
        if not 1 <= wanted <= len(self.images):
            raise UserError(
                f"num_images={wanted}, but protocol {self.protocol.id} has {len(self.images)} images and prompts: give "
                f"1 to {len(self.images)}, or leave it out for all"
            )
        return wanted

    def needs(self, count: int) -> list[Need]:
        """Real images whose features an evaluation stands on, `count` of the reference."""
        wanted = [Need(self.reference_images, count, original), Need(self.reference_images, count, degraded)]
        if self.train_images is not self.reference_images:
            wanted.append(Need(self.train_images, len(self.train_images), original))
        return wanted

    def real(self, count: int) -> Real:
        """What `needs` asked for."""
        reference, degraded_reference = (
            self.reference.read(self.reference_images, count, view) for view in (original, degraded)
        )
        train = reference
        if self.train_images is not self.reference_images:
            train = self.reference.read(self.train_images, len(self.train_images), original)
        return Real(reference, degraded_reference.features, train)

    def key(self, weights_sha256: str, sampling: dict[str, Any]) -> str:
        """sha256 of all that the stored rows of a model's pictures depend on."""
        return digest(
            {
                "protocol": self.protocol.hash,
                "extractor": self.extractor.weights_sha256,
                "weights": weights_sha256,
                "sampling": sampling,
                "num_images": self.count,
                "seed": self.options.seed,
            }
        )

    def store(self, folder: Path, name: str, key: str) -> FeatureStore:
        """Of the pictures `name` in an evaluation's folder."""
        remedy = f"delete {folder} and run the same command again"
        of = {"key": key, "pictures": name, "extractor": identity(self.reference.described)}
        return FeatureStore(folder / FEATURES / name, self.count, of, remedy)

    def read(self, folder: Path, name: str, key: str) -> tuple[dict[str, Tensor], list[float]]:
        """All rows of the pictures `name`, and the fingerprint of the extractor that they were begun with."""
        store = self.store(folder, name, key)
        return store.read(self.count)[0], store.manifest()["extractor"]["fingerprint"]

    def setting(self, real: RealFeatures) -> Setting:
        return Setting(
            protocol=self.protocol,
            images=self.images,
            count=self.count,
            wanted=len(self.images),
            real=real,
            extractor=self.extractor,
            described=self.reference.described,
            device=self.device,
            seed=self.options.seed,
            world=self.ranks.world,
        )


def rank_device(name: str, ranks: Ranks) -> torch.device:
    """Of several ranks on a machine each takes a GPU of its own."""
    device = device_of(name)
    if device.type == "cuda" and device.index in (None, 0) and ranks.world > 1:
        return torch.device("cuda", ranks.local % torch.cuda.device_count())
    return device
