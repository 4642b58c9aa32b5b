"""Who makes which run, and what the ledger keeps: with a training command that takes no time. See test_studying.py."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxflow_train import preemption
from fluxflow_train.ablation.analysis import SCHEMA, analyse
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.ablation.worker import Worker, progress, work_together
from fluxflow_train.errors import EXIT_STOPPED, Stopped, UserError
from fluxflow_train.reports import schema
from tests.ablation.studies import TUNING, VAES, frozen_of, plan_of


class Quick(Worker):
    """Its training command writes what a finished run leaves; `ends` says how a run ends instead, by name."""

    ends: Callable[[str], tuple[int, str]] = staticmethod(lambda name: (0, ""))
    seconds = 0.0

    def train(self, directory: Path, overrides: list[str], lock: int) -> tuple[int, str]:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "made").open("a").write("x")
        time.sleep(self.seconds)
        code, said = self.ends(f"{directory.parent.name}/{directory.name}")
        if code == 0:
            given = dict(override.split("=", 1) for override in overrides)
            scales = json.loads(given.get("evaluate.report.guidance_scales", "[]"))
            finish(directory, 20 + float(given.get("scale.learning_rate", 0)), scales, directory.parent.name == "vae")
        return code, said


def finish(directory: Path, psnr: float, scales: list[float], is_vae: bool) -> None:
    """A VAE that flows are trained on isn't measured by what the study compares."""
    names = ["ssim"] if is_vae else ["psnr", "kid"] if scales or "on_" in directory.name else ["psnr"]
    results = [*({"name": name, "raw": psnr} for name in names), {"name": "rate_nats", "raw": 500.0}]
    report = {"results": results, "status": "final", "status_reasons": [], "environment": {}, "figures": {}}
    # The better the nearer the scale is to 2.
    report["sweep"] = [{"guidance": s, "results": [{"name": "kid", "raw": psnr - abs(s - 2)}]} for s in scales]
    made = {"images_seen": 128, "seconds_training": 1.0, "command": "python", "git": "abc"}
    (directory / "report.json").write_text(json.dumps(report))
    (directory / "model.json").write_text(json.dumps({"sha256": "0", "provenance": made}))
    (directory / "config.yaml").write_text(f"seed: {directory.name}")
    (directory / "metrics.csv").write_text("images_seen,val/psnr\n32,19\n64,20\n")


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., Quick]:
    def build(frozen: Frozen, attempts: int = 2) -> Quick:
        ledger = Ledger(tmp_path / FILE_NAME)
        if not ledger.events():
            ledger.add("frozen", None, None, frozen.record())
        return Quick(
            frozen, tmp_path, ["trainer=cpu"], lambda run: [f"+name={run.arm}"], 1, None, attempts, lambda line: None
        )

    return build


@pytest.fixture(autouse=True)
def no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_noted", [])


def test_everything_is_made_once_trials_first(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(tuning=TUNING))
    worker(frozen).work()
    events = Ledger(tmp_path / FILE_NAME).events()
    assert [event.run for event in events if event.event == "chosen"] == ["bezier-m", "relu-m"]
    made = [event.run for event in events if event.event == "finished"]
    assert made == [run.name for run in frozen.runs]
    begun = {event.run: event.record["overrides"] for event in events if event.event == "begun"}
    for run in frozen.runs:
        rate = run.value if run.phase == "tune" else 0.004  # the best of the trials, as Quick has it
        assert f"scale.learning_rate={rate}" in begun[run.name]
        assert begun[run.name][-2:] == ["trainer=cpu", f"+name={run.arm}"]
    worker(frozen).work()  # nothing is made again
    assert len(Ledger(tmp_path / FILE_NAME).events()) == len(events)
    assert progress(frozen, Ledger(tmp_path / FILE_NAME), 2) == {"finished": 12, "failed": 0, "pending": 0}


def test_the_best_pair_of_rate_and_guidance_is_taken(worker: Callable[..., Quick], tmp_path: Path) -> None:
    tuning = {**TUNING, "guidance": [1, 2, 5]}
    metric = {"name": "kid", "label": "KID", "unit": "", "better": "higher", "split": "test"}
    frozen = frozen_of(plan_of(experiment="flow_bezier", vaes=VAES, tuning=tuning, metric=metric))
    worker(frozen).work()
    ledger = Ledger(tmp_path / FILE_NAME)
    finished = [event.record for event in ledger.events() if event.event == "finished"]
    compared = [record for record in finished if record["phase"] == "main"]
    assert len(compared) == 24
    assert {(record["learning_rate"], record["guidance"]) for record in compared} == {(0.004, 2)}
    report = analyse(ledger, "x")
    schema.check(report, SCHEMA)
    assert [row["chosen"] for row in report["tuning"]] == [{"value": 0.004, "guidance": 2}] * 2
    assert [len(row["points"]) for row in report["tuning"]] == [6, 6] and report["tuning"][0]["edges"] == [0.004]
    assert {run["guidance"] for run in report["runs"]} == {None, 2}


def test_a_failure_is_kept_and_tried_again_and_hides_nothing(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of())
    bad = worker(frozen)
    bad.ends = lambda name: (1, "line\nerror: too many NaN") if name == "main/relu-m-seed0" else (0, "")
    bad.work()
    ledger = Ledger(tmp_path / FILE_NAME)
    failed = [event for event in ledger.events() if event.event == "failed"]
    assert [event.attempt for event in failed] == [1, 2] and "too many NaN" in failed[0].record["error"]
    assert progress(frozen, ledger, 2) == {"finished": 7, "failed": 1, "pending": 0}
    worker(frozen).work()
    assert progress(frozen, ledger, 2)["failed"] == 1  # twice was enough
    worker(frozen, attempts=3).work()
    assert progress(frozen, ledger, 3) == {"finished": 8, "failed": 0, "pending": 0}


def test_a_report_without_the_metric_is_a_failure(worker: Callable[..., Quick], tmp_path: Path) -> None:
    metric = {"name": "kid", "label": "KID", "unit": "", "better": "lower", "split": "test"}
    with pytest.raises(UserError, match="4 different runs failed here one after another"):  # and that is enough
        worker(frozen_of(plan_of(metric=metric)), attempts=1).work()
    errors = [event.record["error"] for event in Ledger(tmp_path / FILE_NAME).events() if event.event == "failed"]
    assert len(errors) == 4 and "has no result kid: there are psnr, rate_nats" in errors[0]


def test_a_run_that_ended_early_is_a_failure(worker: Callable[..., Quick], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended at 128 of 1,000 images"):
        worker(frozen_of(plan_of(budget_images=1000)), attempts=1).work()


def test_a_run_that_memory_ran_out_on_is_not_tried_for_ever(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of())
    killed = worker(frozen)
    killed.ends = lambda name: (-signal.SIGKILL, "") if name == "main/relu-m-seed0" else (0, "")
    killed.work()
    assert progress(frozen, Ledger(tmp_path / FILE_NAME), 2) == {"finished": 7, "failed": 1, "pending": 0}


def test_an_update_with_nan_is_no_reason_to_lose_a_run(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of())

    class Hot(Quick):
        def train(self, directory: Path, overrides: list[str], lock: int) -> tuple[int, str]:
            done = super().train(directory, overrides, lock)
            (directory / "metrics.csv").write_text("images_seen,val/psnr\n32,inf\n64,20\n96,nan\n")
            return done

    Ledger(tmp_path / FILE_NAME).add("frozen", None, None, frozen.record())
    Hot(frozen, tmp_path, [], lambda run: [], 1, None, 2, lambda line: None).work()
    events = Ledger(tmp_path / FILE_NAME).events()
    records = [event.record for event in events if event.event == "finished"]
    assert len(records) == 8 and records[0]["curves"]["val/psnr"] == {"images": [64], "values": [20.0]}


def test_a_rate_at_which_all_arms_diverge_is_a_result(worker: Callable[..., Quick], tmp_path: Path) -> None:
    arms: dict[str, list[str]] = {f"arm{i}": [] for i in range(6)}
    decision = {"size_ratio": None, "against": ["arm1"], "margin": 0.3, "confidence": 0.95}
    frozen = frozen_of(plan_of(arms=arms, candidate="arm0", decision=decision, tuning=TUNING))
    diverging = worker(frozen, attempts=1)
    diverging.ends = lambda name: (1, "NaN") if "0.004" in name else (0, "")
    diverging.work()
    assert progress(frozen, Ledger(tmp_path / FILE_NAME), 1) == {"finished": 6 + 24, "failed": 6, "pending": 0}


def test_a_diverging_trial_is_no_choice_and_stops_nothing(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(tuning=TUNING))
    diverging = worker(frozen)
    diverging.ends = lambda name: (1, "NaN") if "0.004" in name else (0, "")
    diverging.work()
    worker(frozen, attempts=3).work()  # the trials succeed now, but what was chosen stays
    assert Ledger(tmp_path / FILE_NAME).failures() == {f"tune/{arm}-m-0.004-seed100": 2 for arm in ("bezier", "relu")}
    assert len(Ledger(tmp_path / FILE_NAME).finished()) == len(frozen.runs)
    choices = [event.record["value"] for event in Ledger(tmp_path / FILE_NAME).events() if event.event == "chosen"]
    assert choices == [0.001, 0.001]
    for event in Ledger(tmp_path / FILE_NAME).events():
        if event.event == "finished" and event.record["phase"] == "main":
            assert event.record["learning_rate"] == 0.001


def test_flows_wait_for_their_vae_and_are_given_up_without_it(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(experiment="flow_bezier", vaes=VAES))
    bad = worker(frozen)
    bad.ends = lambda name: (1, "broken") if name == "vae/relu-seed0" else (0, "")
    bad.work()
    finished = Ledger(tmp_path / FILE_NAME).finished()
    missing = {run.name for run in frozen.runs} - finished
    assert bad.is_over()
    assert missing == {"vae/relu-seed0"} | {f"main/{a}-{s}-on_relu-seed0" for a in ("bezier", "relu") for s in "sm"}


def test_a_stop_is_no_failure(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of())
    stopping = worker(frozen)
    stopping.ends = lambda name: (EXIT_STOPPED, "SIGTERM") if name.endswith("seed1") else (0, "")
    with pytest.raises(Stopped, match="main/bezier-s-seed1 was stopped"):
        stopping.work()
    worker(frozen).work()
    ledger = Ledger(tmp_path / FILE_NAME)
    assert progress(frozen, ledger, 1)["finished"] == 8 and ledger.failures() == {}
    assert [e.attempt for e in ledger.events() if e.run == "main/bezier-s-seed1"] == [1, 1, 2, 2]


def test_workers_share_the_runs(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(tuning=TUNING))
    together = [worker(frozen) for _ in range(4)]
    for each in together:
        each.seconds = 0.05
    work_together(together)
    made = sorted((tmp_path / "runs").rglob("made"))
    assert len(made) == len(frozen.runs) and all(path.read_text() == "x" for path in made)


def killed_in_a_run(frozen: Frozen, folder: Path) -> None:
    slow = Quick(frozen, folder, [], lambda run: [], 1, None, 2, lambda line: None)
    slow.seconds = 60
    slow.work()


def test_a_killed_worker_leaves_its_run_to_others(worker: Callable[..., Quick], tmp_path: Path) -> None:
    frozen = frozen_of(plan_of())
    worker(frozen)
    process = multiprocessing.get_context("fork").Process(target=killed_in_a_run, args=(frozen, tmp_path))
    process.start()
    ledger = Ledger(tmp_path / FILE_NAME)
    while len(ledger.events()) < 2:
        time.sleep(0.02)
    first = frozen.runs[0].name
    other = worker(frozen)
    assert not other.claim(frozen.runs[0])  # while it lives, it is its own
    assert other.others_work(set()) and not other.is_orphan(frozen.runs[0])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not other.others_work(set()) and other.is_orphan(frozen.runs[0])
    other.work()
    events = [(e.event, e.attempt) for e in ledger.events() if e.run == first]
    assert events == [("begun", 1), ("killed", 1), ("begun", 2), ("finished", 2)]
    assert progress(frozen, ledger, 2)["finished"] == 8


def test_a_signal_ends_all_workers(worker: Callable[..., Quick], monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_of(plan_of())
    together = [worker(frozen) for _ in range(2)]
    for each in together:
        each.seconds = 0.3
    timer = threading.Timer(0.2, lambda: preemption._noted.append("SIGTERM"))
    timer.start()
    with pytest.raises(Stopped):
        work_together(together)
    assert len(Ledger(together[0].folder / FILE_NAME).finished()) == 2  # what was under way came to its end
