"""`evaluate protocol=...` and `prepare reference=...` as typed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fluxflow_train.evaluation.images import Images
from fluxflow_train.generation import Request
from fluxflow_train.metrics import features
from fluxflow_train.pictures import to_pil
from fluxflow_train.pipeline import Pipeline

EVALUATE = "fluxflow_train.evaluate"
Command = Callable[..., Any]


@pytest.fixture
def run(vae_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(vae_run, folder)
    return folder


@pytest.fixture
def flow(flow_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "flow"
    shutil.copytree(flow_run, folder)
    return folder


@pytest.fixture
def root(data_root: Path) -> list[Path]:
    """What lies in the runs' data folder; references made by a test are taken away again."""
    return [data_root]


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("evaluations/*/report.json"))]


def test_a_vae(command: Command, run: Path, write_protocol: Any) -> None:
    done = command(EVALUATE, f"run={run}", f"protocol={write_protocol()}", "device=cpu")
    assert done.code == 0, done.output
    [report] = reports(run)
    assert "paired_distance_colours" in done.output and "(partial)" in done.output
    assert report["command"].startswith("python -m fluxflow_train.evaluate run=")
    assert report["protocol"]["dataset"].startswith("Shapes-") and report["protocol"]["resolution"] == 32
    assert report["model"]["images_seen"] == 32 and report["extractor"]["canonical"] is False
    assert not (run / "report.json").exists()  # the run's own report is another


def test_a_flow_over_guidance(command: Command, flow: Path, write_protocol: Any, source: Any, tmp_path: Path) -> None:
    words = ("num_images=6", "guidance=[1,3]", "steps=2", "device=cpu")
    done = command(EVALUATE, f"run={flow}", f"protocol={write_protocol()}", *words)
    assert done.code == 0, done.output
    [report] = reports(flow)
    assert [each["guidance"] for each in report["sweep"]] == [1, 3]
    assert report["results"] == report["sweep"][0]["results"] != report["sweep"][1]["results"]
    assert [point["guidance"] for point in report["figures"]["pareto"]] == [1, 3]
    assert len(report["figures"]["captioned"]) == 6 and len(report["figures"]["neighbours"]) == 6
    assert report["reference"]["images"] == 48 and report["samples"]["synced"] == 6
    assert {entry["name"] for entry in report["results"]} >= {"kid_colours", "precision", "coverage"}
    assert any(check["name"] == "no picture twice, guidance 3" for check in report["checks"])
    # The fifth picture is what `sample` draws for its caption, seed and number, alone.
    images = Images(source, "train", 32, tmp_path, 0)
    pipeline = Pipeline.from_run(flow, "cpu")
    settings = pipeline.settings(seed=0, guidance=3.0, steps=2)
    alone = pipeline.generate([Request(images.captions([4])[0], "", 4)], settings)
    with Image.open(next(flow.glob("evaluations/*/pictures/guidance-3/000004.png"))) as kept:
        assert kept.tobytes() == to_pil(alone[0]).tobytes()


def test_a_flow_killed_after_some_pictures_ends_with_the_same_report(
    command: Command, flow: Path, write_protocol: Any, numbers: Any
) -> None:
    words = (f"run={flow}", f"protocol={write_protocol()}", "num_images=5", "guidance=2", "steps=1", "device=cpu")
    assert command(EVALUATE, *words).code == 0
    [whole] = reports(flow)
    files = sorted(flow.glob("evaluations/*/features/guidance-2/*.safetensors"))
    for file in files[3:]:
        file.unlink()
    kept = [file.stat().st_mtime_ns for file in files[:3]]
    assert command(EVALUATE, *words).code == 0
    assert numbers(reports(flow)[0]) == numbers(whole)
    assert [file.stat().st_mtime_ns for file in files[:3]] == kept and all(file.exists() for file in files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["protocol=openmoji-tset"], "there is no protocol openmoji-tset: did you mean openmoji-test?"),
        (["protocol=none.yaml"], "protocol=none.yaml can't be read"),
        (["num_images=49"], "num_images=49, but protocol shapes-colours has 48 images"),
        (["num_images=few"], "num_images=few must be a whole number"),
        (["guidance=3"], "guidance is of text-to-image runs"),
        (["steps=3"], "steps is of text-to-image runs"),
        (["lpips=none.pth"], "no LPIPS backbone at none.pth"),
        (["extractor.weights=x.pth"], "extractor.weights is of inception-v3-compat, and the protocol takes colours"),
        (["extractor.name=inception-v4"], "there is no extractor inception-v4: take one of inception-v3-compat"),
        (["protocol=coco2014-val-30k", "extractor.weights={junk}"], "is not weights-inception-2015-12-05-6726825d.pth"),
        (["protocol=coco2017-val-5k", "extractor.weights=none.pth"], "no Inception weights at none.pth"),
        (["device=cuda:9"], "device=cuda:9 is not to be had here"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(
    command: Command, run: Path, write_protocol: Any, tmp_path: Path, options: list[str], said: str
) -> None:
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"no weights")
    chosen = [option.format(junk=junk) for option in options]
    if not any(option.startswith("protocol=") for option in chosen):
        chosen.append(f"protocol={write_protocol()}")
    done = command(EVALUATE, f"run={run}", *chosen)
    assert done.code == 1 and said in done.output, done.output
    assert done.output.count("\n") == 1 and done.output.startswith("error: ")
    assert not (run / "evaluations").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["guidance=high"], "guidance=high must be a number or several"),
        (["guidance=[1,1]"], "names a scale twice"),
        (["guidance=-1"], "must be a number from 0 on"),
        (["steps=0"], "both must be at least 1"),
        (["solver=magic"], "magic"),
        (["lpips=x.pth"], "lpips is of reconstructions"),
        (["clip=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    command: Command, flow: Path, write_protocol: Any, options: list[str], said: str
) -> None:
    done = command(EVALUATE, f"run={flow}", f"protocol={write_protocol()}", "device=cpu", *options)
    assert done.code == 1 and said in done.output and done.output.startswith("error: "), done.output
    assert not (flow / "evaluations").exists()


def test_a_vae_has_no_reference_of_other_images(command: Command, run: Path, write_protocol: Any) -> None:
    done = command(EVALUATE, f"run={run}", f"protocol={write_protocol(reference_split='test')}", "device=cpu")
    assert done.code == 1 and "is of text-to-image runs" in done.output and not (run / "evaluations").exists()


def test_a_split_that_is_none(command: Command, run: Path, write_protocol: Any) -> None:
    path = write_protocol(split="nowhere", reference_split="nowhere")
    done = command(EVALUATE, f"run={run}", f"protocol={path}", "device=cpu")
    assert done.code == 1 and "split nowhere" in done.output and done.output.count("\n") == 1


def test_coco_that_is_not_there(command: Command, run: Path, write_protocol: Any, tmp_path: Path) -> None:
    path = write_protocol(dataset="coco2017", split="val", reference_split="val", train_split=None, resolution=32)
    done = command(EVALUATE, f"run={run}", f"protocol={path}", "device=cpu", f"data.root={tmp_path / 'there'}")
    assert done.code == 1 and done.output.count("\n") == 1, done.output
    assert f"there are no tars in {tmp_path / 'there' / 'coco2017-val'}" in done.output


def test_prepare_makes_what_evaluate_reads_and_repairs_it(
    command: Command, run: Path, write_protocol: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    root, path = tmp_path / "root", write_protocol()
    sizes = [option for option in small if option.startswith(("data", "scale.resolution"))]
    prepare = ("fluxflow_train.prepare", f"reference={path}", *sizes, f"data.root={root}", "device=cpu")
    done = command(*prepare)
    assert done.code == 0 and "reference of shapes-colours: " in done.output, done.output
    files = sorted(root.glob("references/*/*/*.safetensors"))
    assert len(files) == 2 * 48
    before = {file: file.stat().st_mtime_ns for file in files}
    evaluate = (EVALUATE, f"run={run}", f"protocol={path}", "device=cpu", f"data.root={root}")
    assert command(*evaluate).code == 0
    assert {file: file.stat().st_mtime_ns for file in root.glob("references/*/*/*.safetensors")} == before
    files[5].write_bytes(files[5].read_bytes()[:-2])
    refused = command(*evaluate)
    assert refused.code == 1 and "is damaged: delete" in refused.output
    assert command(*prepare).code == 0 and command(*evaluate).code == 0


@pytest.mark.skipif(not features.available(), reason="needs the demo extra: EfficientNet-lite0")
def test_another_extractor_is_another_protocol(command: Command, run: Path, write_protocol: Any) -> None:
    path = write_protocol(split="test", reference_split="test", train_split=None)
    words = ["extractor.name=efficientnet_lite0", f"extractor.resizer={features.RESIZE}", "num_images=3", "device=cpu"]
    done = command(EVALUATE, f"run={run}", f"protocol={path}", *words)
    assert done.code == 0, done.output
    assert command(EVALUATE, f"run={run}", f"protocol={path}", "num_images=3", "device=cpu").code == 0
    first, second = reports(run)
    assert first["protocol"]["hash"] != second["protocol"]["hash"]
    assert {r["extractor"]["name"] for r in (first, second)} == {"efficientnet_lite0", "colours"}
    assert torch.tensor([r["extractor"]["dimension"] for r in (first, second)]).sum() == 1283
