"""Evaluations of a small VAE run: whole, stopped half way, damaged, without room."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxflow_train.cli import explain
from fluxflow_train.errors import UserError
from fluxflow_train.evaluation.images import Images
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.metrics.module_extractor import ModuleExtractor
from fluxflow_train.metrics.reconstruction import psnr
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.weights import load_model

Numbers = Callable[[dict[str, Any]], dict[str, Any]]


class Stopped(ModuleExtractor):
    """Is interrupted, as by Ctrl-C, after so many calls."""

    calls_left = 10**9

    def features(self, image: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        return super().features(image)


@pytest.fixture
def run(vae_run: Path, tmp_path: Path) -> Path:
    """A copy, to be evaluated in."""
    folder = tmp_path / "run"
    shutil.copytree(vae_run, folder)
    return folder


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def chunk_states(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@contextmanager
def no_room(max_bytes: int) -> Iterator[None]:
    """The system refuses files that are larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_numbers_are_those_of_the_pictures(
    run: Path, measure: Any, colours: Any, source: Any, tmp_path: Path
) -> None:
    report, folder = measure(run)
    results = {entry["name"]: entry for entry in report["results"]}
    assert report["samples"]["expected"] == report["samples"]["synced"] == report["samples"]["unique"] == 48
    assert report["kind"] == "evaluation" and report["sweep"] == []
    assert all(check["passed"] for check in report["checks"])
    assert report["status"] == "partial" and "48 images" in report["status_reasons"][0]
    vae: Any = load_model(run)[0]
    image = torch.cat(list(Images(source, "train", 32, tmp_path, 0).batches([range(48)])))
    with torch.no_grad():
        made = quantize(vae(dequantize(image), torch.zeros(48, *vae.latent_shape(32, 32))).x_hat)
    assert results["psnr"]["raw"] == pytest.approx(float(psnr(image, made).mean()), abs=0.01)
    apart = (colours()(image).double() - colours()(made).double()).norm(dim=1).mean()
    assert results["paired_distance_colours"]["raw"] == pytest.approx(float(apart), abs=1e-3)
    assert {"frechet_colours", "frechet_colours_noise_floor", "kid_colours", "ssim", "rate_nats"} <= results.keys()
    assert len(report["figures"]["triples"]) == 16
    assert (folder / "report.json").exists() and (folder / "report.html").exists()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_a_stopped_evaluation_goes_on_where_it_stopped(
    run: Path, measure: Any, colours: Any, numbers: Numbers, tmp_path: Path
) -> None:
    whole, folder = measure(run)
    shutil.rmtree(folder)
    stopped = colours(Stopped)
    stopped.calls_left = 1 + 20  # the fingerprint, then pictures of the model
    with pytest.raises(KeyboardInterrupt):
        measure(run, stopped)
    before = chunk_states(folder)
    assert len(before) == 20 and not (folder / "report.json").exists()
    again, same_folder = measure(run)
    after = chunk_states(folder)
    assert same_folder == folder and len(after) == 48 and before.items() <= after.items()
    assert numbers(again) == numbers(whole)


def test_a_stopped_reference_goes_on_too(
    run: Path, measure: Any, colours: Any, numbers: Numbers, tmp_path: Path
) -> None:
    stopped = colours(Stopped)
    stopped.calls_left = 1 + 30
    with pytest.raises(KeyboardInterrupt):
        measure(run, stopped)
    before = chunk_states(tmp_path / "root")
    assert len(before) == 30 and not (run / "evaluations").exists()
    report, _ = measure(run)
    assert before.items() <= chunk_states(tmp_path / "root").items()
    shutil.rmtree(tmp_path / "root")
    shutil.rmtree(run / "evaluations")
    assert numbers(measure(run)[0]) == numbers(report)


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_damaged_features_are_measured_again(run: Path, measure: Any, numbers: Numbers, how: str, capfd: Any) -> None:
    whole, folder = measure(run)
    files = sorted(folder.rglob("*.safetensors"))
    data = bytearray(files[7].read_bytes())
    data[-3] ^= 4
    files[7].write_bytes(data if how == "bit" else data[:100])
    before = chunk_states(folder)
    again, _ = measure(run)
    assert numbers(again) == numbers(whole)
    changed = {name for name, time in chunk_states(folder).items() if before[name] != time}
    assert changed == {str(files[7].relative_to(folder))}
    assert "was damaged" in capfd.readouterr().err


def test_a_damaged_reference_is_refused_before_anything_is_drawn(run: Path, measure: Any, tmp_path: Path) -> None:
    _, folder = measure(run)
    shutil.rmtree(folder)
    file = sorted((tmp_path / "root").rglob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"^[^\n]*is damaged: delete [^\n]*prepare reference=shapes-colours again$"):
        measure(run)
    assert not folder.exists()
    file.write_bytes(data)
    manifest = file.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace('"count": 48', '"count": 47'))
    with pytest.raises(UserError, match="another count: delete"):
        measure(run)


def test_an_extractor_that_makes_nan_is_refused(run: Path, measure: Any, colours: Any) -> None:
    broken = colours()
    broken.std.fill_(torch.nan)
    with pytest.raises(UserError, match="extractor colours makes NaN"):
        measure(run, broken)


def test_more_images_than_prompts(run: Path, measure: Any, tmp_path: Path) -> None:
    for wanted in (49, 0, -1):
        with pytest.raises(
            UserError, match=f"num_images={wanted}, but protocol shapes-colours has 48 images and prompts"
        ):
            measure(run, num_images=wanted)
    assert not (run / "evaluations").exists() and not (tmp_path / "root" / "references").exists()


def test_a_part_has_a_folder_of_its_own_and_is_partial(run: Path, measure: Any) -> None:
    whole, folder = measure(run)
    part, other = measure(run, num_images=20)
    assert other != folder and part["samples"]["synced"] == part["protocol"]["num_images"] == 20
    assert part["status_reasons"][0] == "only 20 of the protocol's 48 images"
    assert part["protocol"]["hash"] == whole["protocol"]["hash"]
    assert part["reference"]["images"] == 20


def test_a_full_disk_is_one_line_and_no_loss(run: Path, measure: Any, numbers: Numbers) -> None:
    whole, folder = measure(run)
    for file in sorted(folder.rglob("*.safetensors"))[10:]:
        file.unlink()
    (folder / "report.json").unlink()
    before = chunk_states(folder)
    with no_room(500), pytest.raises(OSError) as caught:
        measure(run)
    answer = explain(caught.value)
    assert answer is not None and answer.startswith("error: cannot write") and "\n" not in answer
    assert chunk_states(folder) == before
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert numbers(measure(run)[0]) == numbers(whole)


def test_nothing_of_the_evaluation_enters_the_model(run: Path, measure: Any) -> None:
    names = set(load_model(run)[0].state_dict())
    measure(run)
    model = load_model(run)[0]
    assert set(model.state_dict()) == names
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = [
        key for key in checkpoint["state_dict"] if any(word in key for word in ("metric", "extractor", "inception"))
    ]
    assert kept == [] and not any(isinstance(part, Extractor) for part in model.modules())


def test_the_global_generator_is_left_alone(run: Path, measure: Any) -> None:
    state = torch.get_rng_state()
    measure(run, num_images=8)
    assert torch.equal(torch.get_rng_state(), state)
