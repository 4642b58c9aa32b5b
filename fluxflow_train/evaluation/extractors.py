"""The network behind a protocol's features, and what is said of it."""

from dataclasses import dataclass
from typing import Any

import torch

from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.protocol import Protocol
from fluxflow_train.metrics import features, inception
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.metrics.features import EfficientNetLite0
from fluxflow_train.metrics.inception import Inception, calibrated_random_inception

RANDOM = "inception-random"  # for rehearsals without the weights: nothing it measures is a result
NAMES = (inception.NAME, features.NAME, RANDOM)


@dataclass(frozen=True)
class ExtractorOptions:
    """What the command line says of it: the path of Inception's weights, and whether other weights may pass."""

    weights: str | None = None
    allow_other_weights: bool = False


def open_extractor(
    protocol: Protocol, options: ExtractorOptions, built: Extractor | None, device: torch.device
) -> Extractor:
    """The protocol's extractor, on `device`; `built` where the protocol describes one of the user's.

    Raises:
        UserError: there is no such extractor, its weights are not at hand or wrong, or it resizes otherwise than the
            protocol says.
    """
    name = protocol.extractor_name
    if options.weights is not None and name != inception.NAME:
        raise UserError(f"extractor.weights is of {inception.NAME}, and the protocol takes {name}: leave it out")
    if built is not None:
        extractor = built
    elif name == inception.NAME:
        extractor = Inception(options.weights, protocol.resizer, options.allow_other_weights)
    elif name == features.NAME:
        extractor = EfficientNetLite0()
    elif name == RANDOM:
        extractor = calibrated_random_inception(0, protocol.resizer)
    else:
        raise UserError(f"there is no extractor {name}: take one of {', '.join(NAMES)}, or describe it by _target_")
    if extractor.resizer != protocol.resizer:
        raise UserError(
            f"protocol {protocol.id} resizes by {protocol.resizer}, its extractor {name} by {extractor.resizer}: "
            f"set resizer: {extractor.resizer}"
        )
    return extractor.to(device)


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """Of `Extractor.describe`, what features depend on: a renamed file of the same weights is the same."""
    return {key: described[key] for key in ("name", "weights_sha256", "resizer", "dtype", "fingerprint")}


def distance_name(extractor: Extractor) -> str:
    """Of its Frechet distance: FID is reserved for the canonical weights."""
    return "fid" if extractor.is_canonical else f"frechet_{extractor.name}"
