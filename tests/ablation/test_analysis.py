"""Ledgers with known truth, and what the report says of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fluxflow_train.ablation.analysis import SCHEMA, analyse
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.errors import UserError
from fluxflow_train.reports import schema
from fluxflow_train.reports.study_page import write_study_report
from tests.ablation.studies import CONTENT, TUNING, VAES, frozen_of, plan_of, record_of, simulated, written

SIZES = {"s": [], "m": [], "l": []}
SEEDS = [0, 1, 2, 3, 4]


def report_of(folder: Path, frozen: Frozen, metrics: dict[str, float]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / FILE_NAME)
    written(ledger, frozen, metrics)
    report = analyse(ledger, "python -m fluxflow_train.report study=here")
    json.dumps(report, allow_nan=False)
    schema.check(report, SCHEMA)
    return report


def overall(report: dict[str, Any], baseline: str = "relu") -> dict[str, Any]:
    return next(row for row in report["comparisons"] if row["size"] is None and row["baseline"] == baseline)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [(math.log(4), "supported"), (0.0, "refuted"), (math.log(2), "undecided")],
)
def test_the_claim_of_a_size_ratio(tmp_path: Path, gap: float, verdict: str) -> None:
    """Slope 2 dB an e-fold: an arm that is 2 gap dB better is exp(gap) times smaller at equal quality."""
    frozen = frozen_of(plan_of(sizes=SIZES, seeds=SEEDS))
    report = report_of(tmp_path, frozen, simulated(frozen, {"bezier": 2 * gap, "relu": 0.0}, slope=2.0, sd=0.1))
    (ratio,) = report["ratios"]
    assert ratio["ratio"] == pytest.approx(math.exp(gap), rel=0.1) and ratio["bounded"]
    assert report["answer"]["verdict"] == verdict and report["status"] == "complete"
    assert report["answer"]["headline"].lower().startswith(verdict)
    assert f"{ratio['ratio']:.3g}" in report["answer"]["headline"]
    a, b = ratio["lines"]
    for line in (a, b):  # both lines have the slope
        assert (line["y"][1] - line["y"][0]) / math.log(line["x"][1] / line["x"][0]) == pytest.approx(ratio["slope"])
    assert a["y"][0] - b["y"][0] == pytest.approx(overall(report)["difference"])


def test_every_baseline_must_support_the_claim_and_one_refutes_it(tmp_path: Path) -> None:
    arms = {"bezier": [], "relu": [], "silu": [], "gate5": []}
    decision = {**CONTENT["decision"], "against": ["relu", "silu"]}
    frozen = frozen_of(plan_of(sizes=SIZES, seeds=SEEDS, arms=arms, decision=decision))
    offsets = {"bezier": 2 * math.log(4), "relu": 0.0, "silu": 2 * math.log(4), "gate5": 2 * math.log(8)}
    report = report_of(tmp_path / "a", frozen, simulated(frozen, offsets, slope=2.0, sd=0.05))
    assert report["answer"]["verdict"] == "refuted" and "silu" in report["answer"]["headline"]
    offsets["silu"] = 0.0  # a control that is better than the candidate refutes nothing
    report = report_of(tmp_path / "b", frozen, simulated(frozen, offsets, slope=2.0, sd=0.05))
    assert report["answer"]["verdict"] == "supported"
    assert overall(report, "gate5")["verdict"] == "worse" and not overall(report, "gate5")["claimed"]


def test_differences_are_those_of_a_paired_t_test(tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(seeds=SEEDS, arms={"bezier": [], "relu": [], "silu": []}))
    metrics = simulated(frozen, {"bezier": 0.2, "relu": 0.0, "silu": 0.1}, slope=1.0, sd=0.1)
    report = report_of(tmp_path, frozen, metrics)
    for row in report["comparisons"]:
        sizes = [row["size"]] if row["size"] else ["s", "m"]
        ours, theirs = (
            np.array([np.mean([metrics[f"main/{arm}-{size}-seed{s}"] for size in sizes]) for s in SEEDS])
            for arm in ("bezier", row["baseline"])
        )
        expected = stats.ttest_rel(ours, theirs)
        assert row["p"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
        assert row["correlation"] == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
        assert row["p_holm"] >= row["p"]


def test_a_metric_where_lower_is_better_is_turned(tmp_path: Path) -> None:
    metric = {**CONTENT["metric"], "better": "lower"}
    decision = {"size_ratio": None, "against": ["relu"], "margin": 0.01, "confidence": 0.95}
    frozen = frozen_of(plan_of(seeds=SEEDS, metric=metric, decision=decision))
    metrics = simulated(frozen, {"bezier": -1.0, "relu": 0.0}, slope=-1.0, sd=0.05)
    report = report_of(tmp_path, frozen, metrics)
    assert overall(report)["verdict"] == "better" and overall(report)["difference"] > 0.9
    assert report["answer"]["verdict"] == "different"
    (ratio,) = report["ratios"]
    assert ratio["slope"] > 0 and ratio["ratio"] == pytest.approx(math.e, rel=0.2)
    assert ratio["lines"][0]["y"][0] > ratio["lines"][0]["y"][1]  # drawn as the metric is
    cell = next(c for c in report["cells"] if c["arm"] == "bezier" and c["size"] == "s")
    assert cell["mean"] == pytest.approx(np.mean([metrics[name] for name in cell["runs"]]))


def test_the_same_arm_under_two_names(tmp_path: Path) -> None:
    decision = {"size_ratio": None, "against": ["again", "halved"], "margin": 0.5, "confidence": 0.95}
    arms = {"bezier": [], "again": [], "halved": []}
    frozen = frozen_of(plan_of(sizes=SIZES, seeds=SEEDS, arms=arms, decision=decision))
    offsets = {"bezier": 0.0, "again": 0.0, "halved": -2 * math.log(2)}
    report = report_of(tmp_path, frozen, simulated(frozen, offsets, slope=2.0, sd=0.2))
    assert report["answer"]["verdict"] == "different"
    assert "equal to again within the margin" in report["answer"]["headline"]
    assert "better than halved" in report["answer"]["headline"]
    same, planted = overall(report, "again"), overall(report, "halved")
    assert same["verdict"] == "equal" and same["low"] < 0 < same["high"]
    assert planted["verdict"] == "better" and planted["low"] > 0
    ratio = next(row for row in report["ratios"] if row["baseline"] == "halved")
    assert ratio["low"] < 2 < ratio["high"]


def test_the_four_corners_of_two_vaes_and_two_flows(tmp_path: Path) -> None:
    plan = plan_of(experiment="flow_bezier", vaes=VAES, seeds=SEEDS, sizes={"s": []}, decision={
        "size_ratio": None, "against": ["relu"], "margin": 0.3, "confidence": 0.95})  # fmt: skip
    frozen = frozen_of(plan)
    metrics = {}
    for run in frozen.runs:
        if run.phase == "main":
            vae = {"bezier": 1.0, "relu": 0.0, "common": 0.4}[run.vae or ""]
            flow = {"bezier": 0.5, "relu": 0.0}[run.arm or ""]
            metrics[run.name] = vae + flow + (0.25 if run.vae == run.arm == "bezier" else 0) + 0.01 * run.seed**2 * flow
    report = report_of(tmp_path, frozen, metrics | {r.name: 1.0 for r in frozen.runs if r.phase == "vae"})
    found = report["factorial"]
    effects = {effect["name"]: effect["difference"] for effect in found["effects"]}
    drift = 0.01 * np.mean([s**2 for s in SEEDS]) * 0.5
    assert effects["vae"] == pytest.approx(1.0 + 0.125)
    assert effects["flow"] == pytest.approx(0.5 + drift + 0.125)
    assert effects["interaction"] == pytest.approx(0.25)
    assert found["common"]["difference"] == pytest.approx(0.5 + drift) and found["common"]["vae"] == "common"
    assert found["common"]["verdict"] == "better" and report["answer"]["sentences"][0].startswith(
        "VAE: bezier instead of"
    )


def test_the_better_rate_is_said(tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(seeds=SEEDS))
    metrics = simulated(frozen, {"bezier": 0.2, "relu": 0.0}, slope=1.0, sd=0.1)
    ledger = Ledger(tmp_path / FILE_NAME)
    written(ledger, frozen, {})
    for run in frozen.runs:
        from tests.ablation.studies import record_of

        rate = {"s": 400.0, "m": 800.0}[run.size or ""] * (1.3 if run.arm == "bezier" else 1.0)
        ledger.add("finished", run.name, 1, record_of(run, metrics[run.name], rate))
    report = analyse(ledger, "x")
    assert overall(report)["rates_agree"] is False
    (row,) = report["rate_distortion"]
    assert row["n"] == 5 and row["difference"] < overall(report)["difference"]  # its quality costs rate
    assert any("Rates differ" in warning for warning in report["warnings"])
    assert report["answer"]["verdict"] == "undecided" and "the rate of bezier differs" in report["answer"]["headline"]


def test_what_is_missing_is_said_and_everything_else_stands(tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(tuning=TUNING, seeds=SEEDS, sizes=SIZES))
    metrics = simulated(frozen, {"bezier": 1.0, "relu": 0.0}, slope=2.0, sd=0.1)
    del metrics["main/relu-m-seed3"]
    trials = {run.name: 20 - abs(run.value or 0) for run in frozen.runs if run.phase == "tune"}
    ledger = Ledger(tmp_path / FILE_NAME)
    written(ledger, frozen, metrics | trials)
    ledger.add("begun", "main/relu-m-seed3", 1, {})
    ledger.add("failed", "main/relu-m-seed3", 1, {"error": "one\nerror: NaN in 11 steps"})
    report = analyse(ledger, "x")
    schema.check(report, SCHEMA)
    assert report["status"] == "partial" and report["counts"]["failed"] == 1
    assert overall(report)["n"] == 4 and report["ratios"][0]["n"] == 4
    (failure,) = report["failures"]
    assert failure["run"] == "main/relu-m-seed3" and "NaN in 11 steps" in failure["error"] and not failure["retried"]
    assert "1 of 30 runs to compare have no result" in report["answer"]["headline"]
    assert (
        report["answer"]["verdict"] == "undecided"
        and "runs of these arms failed or are" in report["answer"]["headline"]
    )
    assert any("relu (seed 3) failed" in warning for warning in report["warnings"])
    curve = next(row for row in report["tuning"] if row["arm"] == "relu")
    assert curve["chosen"] == {"value": 0.001, "guidance": None} and curve["edges"] == [0.001]
    assert next(arm for arm in report["arms"] if arm["name"] == "relu")["learning_rates"]["s"] == 0.001


def test_a_rate_of_nothing_leaves_a_report(tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(seeds=SEEDS, sizes=SIZES))
    ledger = Ledger(tmp_path / FILE_NAME)
    written(ledger, frozen, {})
    for run in frozen.runs:  # the posteriors of one arm have collapsed
        ledger.add("finished", run.name, 1, record_of(run, 20.0 + run.seed, 0.0 if run.arm == "relu" else 500.0))
    report = analyse(ledger, "x")
    schema.check(report, SCHEMA)
    assert overall(report)["rates_agree"] is False and report["answer"]["verdict"] == "undecided"
    assert report["rate_distortion"][0]["difference"] is None and report["rate_distortion"][0]["note"]


@pytest.mark.parametrize("guidance", [None, [1, 3]])
def test_a_study_whose_trials_have_not_finished_has_a_page(tmp_path: Path, guidance: list[float] | None) -> None:
    metric = {"name": "kid", "label": "KID", "unit": "", "better": "lower", "split": "test"}
    plan = plan_of(
        experiment="flow_bezier", vaes=VAES, metric=metric, tuning={**TUNING, "guidance": guidance, "seeds": [100, 101]}
    )
    ledger, frozen = Ledger(tmp_path / FILE_NAME), frozen_of(plan)
    written(ledger, frozen, {})
    write_study_report(analyse(ledger, "x"), tmp_path)
    for run in (run for run in frozen.runs if run.phase == "tune" and run.seed == 100):
        swept = [] if guidance is None else [[scale, 0.1 * scale] for scale in guidance]
        ledger.add("finished", run.name, 1, record_of(run, 0.1) | {"swept": swept})
    write_study_report(analyse(ledger, "x"), tmp_path)
    assert "Trials and their runs" in (tmp_path / "report.html").read_text()


def test_nothing_yet(tmp_path: Path) -> None:
    report = report_of(tmp_path, frozen_of(plan_of()), {})
    assert report["answer"]["verdict"] == "no data" and report["counts"]["pending"] == 8
    with pytest.raises(UserError, match="is no ledger of a study"):
        analyse(Ledger(tmp_path / "empty" / FILE_NAME), "x")


def test_every_number_names_its_runs(tmp_path: Path) -> None:
    frozen = frozen_of(plan_of(seeds=SEEDS))
    report = report_of(tmp_path, frozen, simulated(frozen, {"bezier": 1.0, "relu": 0.0}, slope=2.0, sd=0.1))
    rows = {row["name"]: row for row in report["runs"]}
    for cell in report["cells"]:
        values = [rows[name]["metric"] for name in cell["runs"]]
        assert cell["n"] == 5 and cell["mean"] == pytest.approx(np.mean(values))
        assert cell["sd"] == pytest.approx(np.std(values, ddof=1))
    assert all(row["command"].startswith("python -m fluxflow_train") for row in rows.values())
