"""A protocol of seconds: the run's own 48 training shapes, described by their mean colour."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from fluxflow_train.data.sources.shapes import Shapes
from fluxflow_train.evaluation.place import Options
from fluxflow_train.evaluation.protocol import Protocol, parse
from fluxflow_train.evaluation.run import evaluate_run
from fluxflow_train.metrics.extractor import state_sha256
from fluxflow_train.metrics.module_extractor import ModuleExtractor

# Without weights, so that it is the same everywhere, and said not to be random: 3 features, so 15 images are enough.
COLOURS: dict[str, Any] = {
    "_target_": "fluxflow_train.metrics.module_extractor.ModuleExtractor",
    "name": "colours",
    "module": {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "torch.nn.AdaptiveAvgPool2d", "output_size": 1}, {"_target_": "torch.nn.Flatten"}],
    },
    "side": 16,
    "resizer": "tm-aa",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "weights_sha256": state_sha256({}),
}
CONTENT: dict[str, Any] = {
    "id": "shapes-colours",
    "title": "Mean colours of shapes",
    "dataset": "run",
    "split": "train",
    "reference_split": "train",
    "train_split": "train",
    "resolution": "run",
    "crop": "central-square",
    "resizer": "tm-aa",
    "extractor": COLOURS,
    "num_images": None,
    "list": "keys-by-salted-sha256",
}


@pytest.fixture
def colours() -> Callable[..., ModuleExtractor]:
    """`colours()`: the extractor that `COLOURS` describes, or a subclass of its class."""

    def build(kind: type[ModuleExtractor] = ModuleExtractor) -> ModuleExtractor:
        module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        words = {key: COLOURS[key] for key in ("name", "side", "resizer", "mean", "std", "weights_sha256")}
        return kind(module, **words)

    return build


@pytest.fixture
def content() -> dict[str, Any]:
    """A protocol's keys and values."""
    return dict(CONTENT)


@pytest.fixture(scope="session")
def protocol_content() -> dict[str, Any]:
    """The same, not to be changed."""
    return CONTENT


@pytest.fixture
def write_protocol(tmp_path: Path) -> Callable[..., Path]:
    """A protocol's file, with some values in place of the usual ones."""

    def write(**words: Any) -> Path:
        path = tmp_path / "protocol.yaml"
        path.write_text(yaml.safe_dump(CONTENT | words))
        return path

    return write


@pytest.fixture
def protocol() -> Protocol:
    return parse(json.dumps(CONTENT), "protocol")


@pytest.fixture
def source(data_root: Path) -> Shapes:
    """The data of the small runs: 48 training images at 32 px, 12 of the other splits."""
    return Shapes(str(data_root), 32, num_train=48, num_tune=12, num_test=12, pair_prob=0.5, seed=0)


Measure = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def measure(protocol: Protocol, colours: Callable[..., ModuleExtractor], source: Shapes, tmp_path: Path) -> Measure:
    """`measure(run, extractor=..., num_images=...)`: the report and its folder, by `protocol`, references apart."""

    def run(run_dir: Path, extractor: ModuleExtractor | None = None, **options: Any) -> tuple[dict[str, Any], Path]:
        return evaluate_run(
            run_dir,
            protocol,
            Options(device="cpu", **options),
            own=source,
            built=extractor or colours(),
            root=tmp_path / "root",
            provenance={"command": "evaluate", "resolution": 32},
        )

    return run


@pytest.fixture
def numbers() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """All of a report that must not depend on when and by how many processes it was made."""

    def pick(report: dict[str, Any]) -> dict[str, Any]:
        parts = [report["results"], *(each["results"] for each in report["sweep"])]
        results = [[entry for entry in part if entry["name"] != "seconds_per_image"] for part in parts]
        keys = ("checks", "samples", "reference", "protocol", "extractor", "estimator", "status", "warnings", "figures")
        return {"results": results, **{key: report[key] for key in keys}}

    return pick


@pytest.fixture(scope="session")
def protocol_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol in a file of its own."""
    path = tmp_path_factory.mktemp("protocol") / "protocol.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


@pytest.fixture(scope="session")
def evaluated_vae(
    vae_run: Path, protocol_file: Path, launch: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished evaluation. Not to be changed."""
    run = tmp_path_factory.mktemp("evaluated") / "vae"
    shutil.copytree(vae_run, run)
    assert launch("fluxflow_train.evaluate", f"run={run}", f"protocol={protocol_file}", "device=cpu") == 0
    return next(run.glob("evaluations/*"))


@pytest.fixture(scope="session")
def evaluated_flow(
    flow_run: Path, protocol_file: Path, launch: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same of 20 pictures at two guidance scales."""
    run = tmp_path_factory.mktemp("evaluated") / "flow"
    shutil.copytree(flow_run, run)
    words = ("num_images=20", "guidance=[1,3]", "steps=2", "device=cpu")
    assert launch("fluxflow_train.evaluate", f"run={run}", f"protocol={protocol_file}", *words) == 0
    return next(run.glob("evaluations/*"))
