"""Flow training from beginning to end on a trained VAE, resumed, refused, and sampled: as a person meets it."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from fluxflow_train.errors import UserError
from fluxflow_train.weights import load_model

Command = Callable[..., Any]
FLOW = "+experiment=flow_bezier"


@pytest.fixture(scope="module")
def options(flow_options: tuple[str, ...], frozen_text: tuple[str, ...]) -> tuple[str, ...]:
    return (*flow_options, *frozen_text)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def records(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def prompts_of(run: Path) -> list[str]:
    """The captions that the run drew, found as the callback finds them."""
    from hydra.utils import instantiate

    from fluxflow_train import rng

    images = instantiate(OmegaConf.load(run / "config.yaml").data.module)
    order = rng.generator(0, "sample-prompts").permutation(images.num_samples("tune")).tolist()
    return list(dict.fromkeys(images.caption("tune", sample) for sample in order))[:7]


# ---- a finished run ----


def test_run_directory_keeps_its_contract(flow_run: Path) -> None:
    names = {path.relative_to(flow_run).as_posix() for path in flow_run.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "overrides.txt",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model.safetensors",
        "model.json",
        "metrics.csv",
        "samples/images_000000016.png",
        "samples/images_000000032.png",
    }
    rows = records(flow_run)
    assert int(rows[-1]["images_seen"]) == 32
    assert {"train/loss", "train/dropped", "train/lr", "val/loss", "val/loss_t0", "val/loss_t3"} <= set(rows[0])
    assert sum(bool(row["val/loss"]) for row in rows) == 2


def test_export_is_the_average_on_the_vae_it_was_trained_on(flow_run: Path, vae_run: Path) -> None:
    exported = load_file(flow_run / "model.safetensors")
    vae = load_file(vae_run / "model.safetensors")
    average = checkpoint(flow_run)["callbacks"]["EMA"]["average"]
    assert {name: t for name, t in exported.items() if name.startswith(("text.", "flow."))}.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert all(torch.equal(exported[f"vae.{name}"], tensor) for name, tensor in vae.items())
    assert len(exported) == len(average) + len(vae)
    live = checkpoint(flow_run)["state_dict"]
    assert not any(name.startswith("vae") for name in live)
    assert any(not torch.equal(live[name], average[name]) for name in average)


def test_description_says_how_to_sample(flow_run: Path, vae_run: Path) -> None:
    model, description = load_model(flow_run)
    assert [name for name, _ in model.named_children()] == ["vae", "text", "flow"]
    assert description["objective"]["_target_"] == "fluxflow_train.objectives.RectifiedFlow"
    assert description["sampler"] == {
        "solver": "euler", "steps": 3, "guidance": 3.0, "micro_batch": 8, "resolution": 32,
    }  # fmt: skip
    assert description["cfg_dropout_prob"] == 0.1
    assert description["vae_sha256"] == json.loads((vae_run / "model.json").read_text())["sha256"]


# ---- pictures ----


def test_sample_writes_the_grid_of_validation(flow_run: Path, command: Command, tmp_path: Path) -> None:
    prompts = prompts_of(flow_run)
    assert len(prompts) == 7
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sample = ("fluxflow_train.sample", f"run={flow_run}", "device=cpu")
    assert command(*sample, f"prompts={tmp_path}/prompts.txt", f"out={tmp_path / 'out'}").code == 0
    drawn = (flow_run / "samples" / "images_000000032.png").read_bytes()
    assert (tmp_path / "out" / "grid.png").read_bytes() == drawn
    assert (flow_run / "samples" / "images_000000016.png").read_bytes() != drawn
    # One more seed is another picture: the equality above is not that of blank sheets.
    assert command(*sample, f"prompts={tmp_path}/prompts.txt", f"out={tmp_path / 'other'}", "seed=1").code == 0
    assert (tmp_path / "other" / "grid.png").read_bytes() != drawn


def test_one_picture_is_the_same_as_one_of_seven(flow_run: Path, command: Command, tmp_path: Path) -> None:
    prompts = prompts_of(flow_run)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sample = ("fluxflow_train.sample", f"run={flow_run}", "device=cpu")
    requests = {
        "prompts": f"prompts={tmp_path}/prompts.txt",
        "one": f'prompts=["{prompts[3]}"]',
        "seven": f'prompts=["{prompts[3]}"]',
    }
    for name, asked in requests.items():
        number = "num_images=7" if name == "seven" else "num_images=1"
        assert command(*sample, asked, number, f"out={tmp_path / name}").code == 0
    alone = (tmp_path / "one" / "0000.png").read_bytes()
    assert (tmp_path / "prompts" / "0003.png").read_bytes() == alone
    assert (tmp_path / "seven" / "0000.png").read_bytes() == alone
    for name in ("prompts", "seven"):  # and the others are other pictures, not only other words in the file
        assert len({pixels(tmp_path / name / f"{i:04d}.png") for i in range(7)}) == 7


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


# ---- resumed ----


def stop_here(*_: Any) -> None:
    raise UserError("stopped by the test")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., int], options: tuple[str, ...]) -> Path:
    """The same run as `flow_run`, cut short in its last step: its checkpoint is of 24 images."""
    run = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxflow_train.tasks.flow.FlowTask.record_training", stop_at_the_end)
        assert launch("fluxflow_train", FLOW, *options, f"run={run}") == 1
    assert checkpoint(run)["task"]["images_seen"] == 24
    return run


def stop_at_the_end(task: Any, lr: float) -> None:
    from fluxflow_train.tasks.budget import BudgetTask

    BudgetTask.record_training(task, lr)
    if task.images_seen == 32:
        stop_here()


def resumable(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    flow_run: Path, interrupted: Path, command: Command, tmp_path: Path
) -> None:
    run = resumable(interrupted, tmp_path / "resumed")
    code, output = command("fluxflow_train", f"run={run}")
    assert code == 0, output
    assert "resuming at 24 images" in output
    for part in ("state_dict", "callbacks", "optimizer_states"):
        ours, theirs = checkpoint(run)[part], checkpoint(flow_run)[part]
        if part == "optimizer_states":
            ours, theirs = ours[0]["state"], theirs[0]["state"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (run / "model.safetensors").read_bytes() == (flow_run / "model.safetensors").read_bytes()
    grid = "samples/images_000000032.png"
    assert (run / grid).read_bytes() == (flow_run / grid).read_bytes()
    timing = {"train/images_per_second"}
    kept = [[{k: v for k, v in row.items() if k not in timing} for row in records(r)] for r in (run, flow_run)]
    assert kept[0] == kept[1]


def test_finished_run_resumes_to_nothing_new(flow_run: Path, command: Command) -> None:
    before = (flow_run / "metrics.csv").read_text(), (flow_run / "model.safetensors").read_bytes()
    assert command("fluxflow_train", f"run={flow_run}").code == 0
    assert ((flow_run / "metrics.csv").read_text(), (flow_run / "model.safetensors").read_bytes()) == before


def test_resume_on_another_vae_is_refused(
    interrupted: Path, vae_run: Path, options: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    """The VAE's folder now holds other weights; or it moved, which is no harm."""
    run = resumable(interrupted, tmp_path / "run")
    vae = resumable(vae_run, tmp_path / "vae")
    assert command("fluxflow_train", FLOW, *options, f"vae={vae}", f"run={run}").code == 0

    run = resumable(interrupted, tmp_path / "again")
    retrain(vae)
    config = OmegaConf.load(run / "config.yaml")
    config.vae = config.task.vae = str(vae)  # type: ignore[union-attr]
    OmegaConf.save(config, run / "config.yaml")
    code, output = command("fluxflow_train", f"run={run}")
    assert code == 1
    assert output.splitlines()[-1].startswith(f"error: {vae} holds other weights than this run began with")
    code, output = command("fluxflow_train", FLOW, *options, f"vae={vae}", f"run={run}")
    assert code == 1
    assert "vae_sha256=" in output.splitlines()[-1]


def retrain(vae: Path) -> None:
    """Other weights of the same architecture, as another training would export them."""
    from fluxflow_train.weights import save_model

    model, description = load_model(vae)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    save_model(vae, model, OmegaConf.create(description.pop("architecture")), description)


def test_latest_vae_of_a_resumed_run_is_the_one_it_began_with(
    interrupted: Path, vae_run: Path, options: tuple[str, ...], command: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    newer = resumable(vae_run, tmp_path / "outputs" / "vae_bezier" / "newer")
    retrain(newer)
    run = resumable(interrupted, tmp_path / "run")
    assert command("fluxflow_train", FLOW, *options, "vae=latest", f"run={run}").code == 0
    sha256 = json.loads((vae_run / "model.json").read_text())["sha256"]
    assert json.loads((run / "model.json").read_text())["vae_sha256"] == sha256


# ---- other arms, objectives and backbones ----


# Narrower, no multiple of 4 comes within 1 % of the Bezier arm.
MATCHABLE = ("scale.flow.width=64", "scale.flow.text_width=128", "scale.flow.text_hidden=256")


@pytest.mark.parametrize(
    ("experiment", "overrides", "text"),
    [
        ("flow_bezier", ("objective=v_prediction",), ("model/text=scratch",)),
        ("flow_relu", ("task.latents=null", "task.sampler.solver=unipc", *MATCHABLE), None),
        ("flow_bezier", ("model/flow=dit", "match=none", "task.sampler.solver=heun"), None),
        ("flow_bezier", ("model/flow=fluxflow080", "objective=v_prediction"), None),
    ],
)
def test_other_runs(
    experiment: str,
    overrides: tuple[str, ...],
    text: tuple[str, ...] | None,
    flow_options: tuple[str, ...],
    frozen_text: tuple[str, ...],
    command: Command,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    text = frozen_text if text is None else text
    code, output = command(
        "fluxflow_train", f"+experiment={experiment}", *flow_options, *text, *overrides, "budget.images=16",
        "callbacks.samples.num_prompts=2", f"run={run}",
    )  # fmt: skip
    assert code == 0, output
    assert (run / "match.txt").exists() == (experiment == "flow_relu")
    rows = records(run)
    assert 0 < float(rows[-1]["val/loss"] or rows[-2]["val/loss"]) < 10
    sample = ("fluxflow_train.sample", f"run={run}", "prompts=[a red circle]", "device=cpu")
    assert command(*sample, f"out={tmp_path / 'out'}").code == 0
    assert (tmp_path / "out" / "0000.png").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("task.sampler.solver=foo", "solver=foo is none of ours"),
        ("task.sampler.steps=0", "steps=0"),
        ("task.sampler.guidance=-2", "guidance=-2"),
    ],
)
def test_a_sampler_that_draws_nothing_is_refused_before_training(
    options: tuple[str, ...], command: Command, tmp_path: Path, option: str, said: str
) -> None:
    run = tmp_path / "run"
    code, output = command("fluxflow_train", FLOW, *options, option, f"run={run}")
    assert code == 1 and output.splitlines()[-1].startswith("error: ") and said in output
    assert not (run / "checkpoints").exists()


def test_match_is_written_down(options: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    """Text and flow, with their residuals, before training begins."""
    run = tmp_path / "run"
    stopped = "task.cfg_dropout_prob=2"  # refused when the task is built: the match is made before
    code, output = command("fluxflow_train", "+experiment=flow_relu", *options, *MATCHABLE, stopped, f"run={run}")
    assert code == 1
    assert output.splitlines()[-1] == "error: cfg_dropout_prob must be in [0, 1], got 2"
    table = (run / "match.txt").read_text()
    for part in ("text", "flow"):
        (line,) = [line for line in table.splitlines() if line.startswith(f"parameters, {part} ")]
        assert abs(float(line.split()[-1].rstrip("%"))) < 1
