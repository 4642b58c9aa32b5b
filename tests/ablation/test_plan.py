from pathlib import Path

import pytest
import yaml

from fluxflow_train.ablation import plan_file
from fluxflow_train.ablation.plan import expand
from fluxflow_train.ablation.plan_file import load, parse
from fluxflow_train.ablation.tuning import Choice
from fluxflow_train.cli import config_folder
from fluxflow_train.errors import UserError
from tests.ablation.studies import CONTENT, TUNING, VAES, frozen_of, plan_of


def test_runs_of_a_plan_are_balanced_over_arms() -> None:
    names = [run.name for run in expand(plan_of())]
    assert names == [f"main/{arm}-{size}-seed{seed}" for seed in (0, 1) for size in "sm" for arm in ("bezier", "relu")]


def test_trials_come_first_and_are_equal_for_all_arms() -> None:
    runs = expand(plan_of(tuning=TUNING))
    trials = [run for run in runs if run.phase == "tune"]
    assert len(trials) == 4 and runs[:4] == trials
    assert {(r.arm, r.value) for r in trials} == {(a, v) for a in ("bezier", "relu") for v in (0.001, 0.004)}
    for run in runs[4:]:
        assert set(run.needs) == {r.name for r in trials if r.arm == run.arm}


def test_flows_need_the_vae_of_their_seed() -> None:
    runs = expand(plan_of(experiment="flow_bezier", vaes=VAES, tuning=TUNING))
    vaes = [run.name for run in runs if run.phase == "vae"]
    assert len(vaes) == len(set(vaes)) == 3 * 2 + 1  # and one more for the trials
    for run in runs:
        if run.phase != "vae":
            assert f"vae/{run.vae}-seed{run.seed}" in run.needs
    frozen = frozen_of(plan_of(experiment="flow_bezier", vaes=VAES))
    run = next(r for r in frozen.runs if r.name == "main/relu-m-on_common-seed1")
    assert "vae='study/runs/vae/common-seed1'" in frozen.overrides(run, None, Path("study"))


def test_a_run_is_one_exact_command() -> None:
    frozen = frozen_of(plan_of(tuning=TUNING))
    trial, run = frozen.runs[0], frozen.runs[-1]
    common = ["+experiment=vae_bezier", "data=shapes", "scale.vae.encoder_widths=[16,16,16]"]
    assert frozen.overrides(trial, None, Path("d")) == [
        *common, "activation=bezier", "model.encoder.widths=[9]", f"scale.learning_rate={trial.value}",
        "trainer.precision=32-true", f"run_id=study-beef-{trial.name.replace('/', '-')}", "match=none",
        "seed=100", "budget.images=32", "evaluate.split=tune",
        f"run='d/runs/{trial.name}'",
    ]  # fmt: skip
    assert frozen.overrides(run, Choice(0.001, None), Path("d")) == [
        *common, "activation=relu", "model.encoder.widths=[9]", "scale.learning_rate=0.001",
        "trainer.precision=32-true", "run_id=study-beef-main-relu-m-seed1", "match=none", "seed=1",
        "budget.images=64", "evaluate.split=test",
        "run='d/runs/main/relu-m-seed1'",
    ]  # fmt: skip


def test_guidance_is_tuned_with_the_rate() -> None:
    metric = {**CONTENT["metric"], "name": "kid"}
    plan = plan_of(experiment="flow_bezier", vaes=VAES, metric=metric, tuning={**TUNING, "guidance": [1, 2.5]})
    frozen = frozen_of(plan)
    trial, run = (next(r for r in frozen.runs if r.phase == phase) for phase in ("tune", "main"))
    assert "evaluate.report.guidance_scales=[1,2.5]" in frozen.overrides(trial, None, Path("d"))
    chosen = frozen.overrides(run, Choice(0.001, 2.5), Path("d"))
    assert {"scale.learning_rate=0.001", "task.sampler.guidance=2.5"} <= set(chosen)
    assert not any("guidance_scales" in override for override in chosen)


def test_every_key_is_in_the_hash() -> None:
    hashes = {plan_of().hash}
    changes = [{"seeds": [0, 2]}, {"tuning": TUNING}, {"budget_images": 65}, {"question": "Why?"}]
    changes += [{"metric": {**CONTENT["metric"], "name": "ssim"}}, {"decision": {**CONTENT["decision"], "margin": 0.2}}]
    for change in changes:
        hashes.add(plan_of(**change).hash)
    assert len(hashes) == len(changes) + 1
    assert parse(plan_of(tuning=TUNING).content, "again").hash == plan_of(tuning=TUNING).hash


@pytest.mark.parametrize("path", sorted((config_folder() / plan_file.FOLDER).glob("*.yaml")), ids=lambda p: p.stem)
def test_plans_that_ship_are_well_formed(path: Path) -> None:
    plan = load(path.stem)
    assert plan.name == path.stem and len(expand(plan)) > 4
    assert yaml.safe_load(path.read_text())["question"].endswith("?")


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"candidate": "gelu"}, "candidate=gelu is no arm"),
        ({"arms": {"bezier": []}, "candidate": "bezier"}, "two arms or more"),
        ({"match": "size"}, "match=size: it is one of"),
        ({"seeds": []}, "must not be empty"),
        ({"seeds": [0, 0]}, "seeds must differ"),
        ({"seeds": "0"}, "seeds='0' must be a list"),
        ({"budget_images": 1.5}, "budget_images=1.5 must be a whole number"),
        ({"targets": "yes"}, "targets='yes' must be true or false"),
        ({"arms": {"a/b": [], "bezier": []}}, "'a/b' of arms must be letters"),
        ({"seed": 1}, "unknown key seed: did you mean seeds?"),
        ({"decision": {"margin": 1}}, "lacks the key size_ratio"),
        ({"decision": {**CONTENT["decision"], "against": ["bezier"]}}, "decision.against names arms"),
        ({"decision": {**CONTENT["decision"], "confidence": 0.3}}, "confidence lies between"),
        ({"match": "none"}, "arms that are matched"),
        ({"tuning": {**TUNING, "sizes": ["x"]}}, "tuning.sizes x are no sizes"),
        ({"tuning": {**TUNING, "guidance": [1, 3]}}, "in a study of flows"),
        ({"vaes": VAES, "tuning": {**TUNING, "guidance": [1, 3]}}, "metric.name=psnr does not depend on guidance"),
        ({"tuning": {**TUNING, "seeds": []}}, "must not be empty"),
        ({"tuning": {**TUNING, "values": [0.1, 0.1]}}, "must differ"),
        ({"vaes": {**VAES, "arms": {}}}, "vaes.arms must not be empty"),
        ({"metric": {**CONTENT["metric"], "split": "tset"}}, "metric.split=tset: it is one of train, tune, test"),
        ({"decision": {**CONTENT["decision"], "against": ["relu", "relu"]}}, "names an arm twice"),
        ({"decision": {**CONTENT["decision"], "margin": float("nan")}}, "margin is positive"),
        ({"tolerance": -1}, "tolerance is positive"),
        ({"budget_images": 0}, "budget_images is positive"),
        ({"vaes": VAES, "tuning": {**TUNING, "guidance": []}}, "tuning.guidance holds scales"),
        ({"tuning": {**TUNING, "seeds": [1]}}, r"tuning.seeds \[1\] are compared later"),
    ],
)
def test_what_is_no_plan_gets_one_line(change: dict, answer: str) -> None:
    with pytest.raises(UserError, match=answer) as error:
        plan_of(**change)
    assert "\n" not in str(error.value) and str(error.value).startswith("study.yaml")


def test_names_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no plan vae_pilt: did you mean vae_pilot"):
        load("vae_pilt")
    with pytest.raises(UserError, match="can't be read"):
        load(str(tmp_path / "none.yaml"))
    for text, answer in (("a: [", "is no YAML"), ("- 1", "holds no keys"), ("a: 1", "unknown key a")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=answer):
            load(str(tmp_path / "x.yaml"))
