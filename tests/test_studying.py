"""The command: plans, dry runs, a real study that is killed on the way, and its report from the ledger alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from tests.ablation.studies import CONTENT, VAES

Command = Callable[..., Any]
SIZES = {
    "s": ["scale.vae.encoder_widths=[8,8,8]", "scale.vae.decoder_widths=[8,8,8]"],
    "m": ["scale.vae.encoder_widths=[8,12,20]", "scale.vae.decoder_widths=[20,12,8]"],
}
WHERE = ("trainer", "latents_device", "budget", "scale.vae.encoder", "scale.vae.decoder")


@pytest.fixture
def write(tmp_path: Path, small: tuple[str, ...]) -> Callable[..., Path]:
    """`write(**changes)`: a plan of two arms, two sizes and one seed, small."""
    shared = [option for option in small if not option.startswith(WHERE)]

    def plan(**changes: Any) -> Path:
        content = {key: value for key, value in CONTENT.items() if key != "name"}
        content |= {"overrides": [*shared, "scale.vae.norm_groups=2", "evaluate.report.with_features=false"]}
        content |= {"sizes": SIZES, "seeds": [0], "budget_images": 16, "tolerance": 0.02}
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return plan


def test_a_dry_run_makes_nothing(command: Command, write: Callable[..., Path], tmp_path: Path) -> None:
    plan = write()
    code, output = command("fluxflow_train.study", f"plan={plan}", f"dir={tmp_path / 'study'}", "dry_run=true")
    assert code == 0, output
    rows = [line.split() for line in output.splitlines() if line.split()[:1] in (["bezier"], ["relu"])]
    table = [row for row in rows if row[1] in ("s", "m")]
    assert len(table) == 4 and all(abs(float(row[5].rstrip("%"))) <= 2 for row in table if row[4] in ("M", "G"))
    assert "4 runs: 4 to compare" in output and "one by one" in output
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"arms": {"bezier": [], "relu": ["activaton=relu"]}}, "arms.relu at size s: Could not override 'activaton'"),
        ({"tolerance": 0.00001}, "arm relu at size s: no widths in multiples of"),
        ({"match": "nothing"}, "small.yaml: match=nothing: it is one of"),
    ],
)
def test_what_a_plan_can_get_wrong(
    command: Command, write: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], answer: str
) -> None:
    code, output = command("fluxflow_train.study", f"plan={write(**changes)}", f"dir={tmp_path / 'study'}")
    assert code == 1 and len(output.strip().splitlines()) == 1, output
    assert output.startswith("error: ") and answer in output
    assert not (tmp_path / "study" / FILE_NAME).exists()


def test_runs_keep_what_the_plan_says(command: Command, write: Callable[..., Path], tmp_path: Path) -> None:
    given = ("fluxflow_train.study", f"plan={write()}", f"dir={tmp_path}")
    for override in ("scale=small", "trainer.precision=bf16-mixed", "evaluate.split=tune", "trainer.max_steps=3"):
        code, output = command(*given, f"runs.overrides=['{override}']")
        assert code == 1 and "could change what is compared" in output
    code, output = command("fluxflow_train.report", f"study={tmp_path / 'nowhere'}")
    assert code == 1 and "is no ledger of a study" in output


def test_a_study_is_killed_goes_on_and_reports_from_its_ledger_alone(
    command: Command, write: Callable[..., Path], tmp_path: Path, data_root: Path
) -> None:
    plan, folder = write(), tmp_path / "study"
    options = [f"plan={plan}", f"dir={folder}", "workers=2", "runs.trainer=cpu", f"data.root={data_root}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxflow_train.study", *options], stderr=subprocess.PIPE, start_new_session=True
    )
    ledger = Ledger(folder / FILE_NAME)
    while sum(event.event == "finished" for event in ledger.events()) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.1)
    time.sleep(1)  # into the runs that come next
    process.kill()  # its runs live on, and keep their claims
    process.wait()
    code, output = command("fluxflow_train.study", *options)
    assert code == 0, output
    events = ledger.events()
    finished = [event for event in events if event.event == "finished"]
    assert len(finished) == 4 and sum(event.event == "killed" for event in events) in (1, 2)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "complete" and report["counts"]["finished"] == 4
    assert {failure["event"] for failure in report["failures"]} == {"killed"}
    for row in report["runs"]:  # every number is that of a run's own report
        own = json.loads((folder / row["directory"] / "report.json").read_text())
        assert row["metric"] == next(entry["raw"] for entry in own["results"] if entry["name"] == "psnr")
        config = yaml.safe_load((folder / row["directory"] / "config.yaml").read_text())
        assert (config["seed"], config["budget"]["images"], config["activation"]["encoder"]) == (0, 16, row["arm"])
    assert report["health"] and report["curves"] and report["pictures"]
    assert "https://" not in (folder / "report.html").read_text().replace("https://www.w3.org", "")

    code, output = command("fluxflow_train.study", *options)  # nothing is made again
    assert code == 0 and len(ledger.events()) == len(events)
    other = write(seeds=[1])
    code, output = command("fluxflow_train.study", f"plan={other}", f"dir={folder}")
    assert code == 1 and "frozen with other seeds" in output

    shutil.rmtree(folder / "runs")
    code, output = command("fluxflow_train.report", f"study={folder}")
    assert code == 0 and json.loads((folder / "report.json").read_text()) == report


@pytest.mark.slow
def test_a_signal_saves_all_and_the_same_command_goes_on(write: Callable[..., Path], tmp_path: Path, data_root: Path):
    folder = tmp_path / "study"
    options = [f"plan={write(budget_images=400)}", f"dir={folder}", "runs.trainer=cpu", f"data.root={data_root}"]
    command = [sys.executable, "-m", "fluxflow_train.study", *options]
    ledger = Ledger(folder / FILE_NAME)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while not list((folder / "runs").rglob("last.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 85 and b"the same command goes on" in said
    assert [event.event for event in ledger.events()] == ["frozen", "begun", "stopped"]
    assert subprocess.run(command, check=False).returncode == 0
    assert json.loads((folder / "report.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_flows_on_vaes_that_are_trained_first(
    command: Command, write: Callable[..., Path], tmp_path: Path, data_root: Path, frozen_text: tuple[str, ...]
) -> None:
    """{Bezier, ReLU} x {Bezier, ReLU} and a common VAE, rate and guidance tuned, the four rows of the targets."""
    shared = yaml.safe_load(write().read_text())["overrides"]
    vaes = VAES | {"overrides": [*shared, *SIZES["s"]], "budget_images": 16}
    own = [o for o in shared if not o.startswith("evaluate.report")]
    plan = write(
        experiment="flow_bezier",
        overrides=[*own, *frozen_text, "task.sampler.steps=2", "callbacks.samples.num_prompts=2"],
        sizes={"w32": ["scale.flow.width=32"]},
        vaes=vaes,
        tolerance=0.1,
        targets=True,
        tuning={"key": "scale.flow.learning_rate", "values": [0.001, 0.002], "guidance": [1, 2.5], "sizes": ["w32"],
                "seeds": [100], "budget_images": 16},
        metric={"name": "kid", "label": "KID", "unit": "", "better": "lower", "split": "test"},
        decision={"size_ratio": None, "against": ["relu"], "margin": 0.1, "confidence": 0.95},
    )  # fmt: skip
    folder = tmp_path / "study"
    code, output = command(
        "fluxflow_train.study", f"plan={plan}", f"dir={folder}", "workers=2", "runs.trainer=cpu",
        f"data.root={data_root}", "runs.overrides=['latents_device=cpu']",
    )  # fmt: skip
    assert code == 0, output
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "complete" and report["counts"]["finished"] == 3 + 1 + 4 + 6
    for row in report["tuning"]:
        assert [(p["value"], p["guidance"]) for p in row["points"]] == [
            (v, g) for v in (0.001, 0.002) for g in (1, 2.5)
        ]
        best = min(row["points"], key=lambda point: point["mean"])
        assert row["chosen"] == {"value": best["value"], "guidance": best["guidance"]}
        for run in (run for run in report["runs"] if (run["phase"], run["arm"]) == ("main", row["arm"])):
            config = yaml.safe_load((folder / run["directory"] / "config.yaml").read_text())
            assert config["task"]["sampler"]["guidance"] == best["guidance"] == run["guidance"]
    assert [effect["name"] for effect in report["factorial"]["effects"]] == ["vae", "flow", "interaction"]
    rows = {row["name"]: row["values"] for row in report["targets"]["rows"]}
    assert all(value > 0 for name in ("parameters", "seconds", "memory_gib") for value in rows[name].values())
    assert set(rows["fid"].values()) == {None}
