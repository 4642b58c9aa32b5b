"""Arrays of arms and seeds, the evaluation's script, and Hydra's own launcher, on the cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from tests.ablation.studies import CONTENT as STUDY
from tests.evaluation.conftest import CONTENT
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import REPOSITORY, Jobs

pytestmark = pytest.mark.slurm
SHORT = ("budget.images=32", "gan=none")


def test_array_of_arms_and_seeds(jobs: Jobs, tmp_path: Path) -> None:
    options = (*jobs.options, *SHORT, f"run={tmp_path}/${{activation.encoder}}-${{seed}}")
    sbatch = (
        "--array=0-3",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        f"--output={jobs.cluster.folder}/job-%A_%a.out",
    )
    script = REPOSITORY / "slurm" / "sweep.sbatch"
    variables = jobs.variables()
    job = jobs.cluster.submit(script, "bezier relu", "0 1", *options, options=sbatch, **variables)
    names = {f"{arm}-{seed}" for arm in ("bezier", "relu") for seed in (0, 1)}
    wait_for(
        lambda: {path.parent.name for path in tmp_path.glob("*/model.json")} == names, 180, f"{job}", jobs.cluster.log
    )
    for name in names:
        config = OmegaConf.load(tmp_path / name / "config.yaml")
        assert f"{config.activation.encoder}-{config.seed}" == name  # type: ignore[union-attr]


def test_shards_on_the_nodes_own_disk(jobs: Jobs, data_root: Path, tmp_path: Path) -> None:
    script, run, local = REPOSITORY / "slurm" / "train.sbatch", tmp_path / "run", tmp_path / "local"
    sbatch = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={jobs.cluster.folder}/job-%j.out")
    variables = jobs.variables(FLUXFLOW_STAGE=str(data_root), FLUXFLOW_LOCAL=str(local))
    job = jobs.cluster.submit(script, *jobs.options, *SHORT, f"run={run}", options=sbatch, **variables)
    jobs.completed(job)
    (copy,) = local.iterdir()
    assert OmegaConf.load(run / "config.yaml").data.root == str(copy)  # type: ignore[union-attr]
    assert {path.name for path in copy.glob("shapes-*")} == {path.name for path in data_root.glob("shapes-*")}


def test_evaluation_by_two_tasks(jobs: Jobs, vae_run: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(yaml.safe_dump(CONTENT))
    arguments = (f"run={vae_run}", f"protocol={protocol}", "device=cpu", f"data.root={tmp_path}")
    sbatch = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={jobs.cluster.folder}/job-%j.out")
    script = REPOSITORY / "slurm" / "evaluate.sbatch"
    job = jobs.cluster.submit(script, *arguments, options=sbatch, **jobs.variables())
    jobs.completed(job)
    (report,) = vae_run.glob("evaluations/*/report.json")
    assert json.loads(report.read_text())["environment"]["world_size"] == 2


def test_array_of_a_studys_workers(jobs: Jobs, tmp_path: Path) -> None:
    """Two jobs share the runs of one plan; the last to end has the whole report."""
    shared = [option for option in (*jobs.options, *SHORT) if not option.startswith(("+experiment", "budget", "run="))]
    plain = [
        option for option in shared if not option.startswith(("trainer", "latents_device", "data.root", "evaluate"))
    ]
    plan = tmp_path / "plan.yaml"
    content = {key: value for key, value in STUDY.items() if key != "name"} | {"overrides": plain, "seeds": [0, 1]}
    content |= {"sizes": {"s": []}, "budget_images": 32, "tolerance": 0.05}
    decision = {"size_ratio": None, "against": ["relu"], "margin": 0.5, "confidence": 0.95}
    plan.write_text(yaml.safe_dump(content | {"decision": decision}, sort_keys=False))
    study = tmp_path / "study"
    root = next(option for option in jobs.options if option.startswith("data.root="))
    given = (f"plan={plan}", f"dir={study}", "runs.trainer=cpu", root)
    sbatch = ("--array=0-1", "--ntasks-per-node=1", "--cpus-per-task=1")
    sbatch += (f"--output={jobs.cluster.folder}/job-%A_%a.out",)
    script = REPOSITORY / "slurm" / "study.sbatch"
    job = jobs.cluster.submit(script, *given, options=sbatch, **jobs.variables())

    def is_complete() -> bool:
        report = study / "report.json"
        return report.exists() and json.loads(report.read_text())["status"] == "complete"

    wait_for(is_complete, 300, f"{job}", jobs.cluster.log)
    events = Ledger(study / FILE_NAME).events()
    assert [e.event for e in events].count("finished") == [e.event for e in events].count("begun") == 4


def test_hydras_launcher(jobs: Jobs, tmp_path: Path) -> None:
    launcher = [f"hydra.launcher.{option}" for option in ("timeout_min=5", "cpus_per_task=1", "mem_gb=2")]
    sweep = [f"hydra.sweep.dir={tmp_path}/sweep", "seed=0,1", "run='${oc.env:SWEEP}/run-${seed}'"]
    command = [sys.executable, "-m", "fluxflow_train", "-m", "hydra/launcher=submitit_slurm", *launcher, *sweep]
    done = subprocess.run(
        [*command, *jobs.options, *SHORT],
        env=jobs.cluster.environment | jobs.variables(SWEEP=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=150,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.parent.name for path in tmp_path.glob("run-*/model.json")} == {"run-0", "run-1"}
