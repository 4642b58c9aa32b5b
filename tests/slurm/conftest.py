"""One cluster for the session, and jobs that are small."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.slurm.cluster import Cluster, missing, wait_for

REPOSITORY = Path(__file__).parent.parent.parent
IMAGES = 1920  # about half a minute of two nodes on two cores


class Jobs(NamedTuple):
    """How tests start the project's own batch scripts on the cluster."""

    cluster: Cluster
    options: tuple[str, ...]  # of the command, without `run=`

    def train(self, run: Path, *sbatch: str, script: str = "train", **variables: str) -> str:
        """Two nodes of one task. The job's id."""
        chosen = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={self.cluster.folder}/job-%j.out")
        script_path = REPOSITORY / "slurm" / f"{script}.sbatch"
        arguments = (*self.options, f"run={run}")
        return self.cluster.submit(script_path, *arguments, options=(*chosen, *sbatch), **self.variables(**variables))

    def variables(self, **more: str) -> dict[str, str]:
        environment = str(Path(sys.prefix))
        return {"FLUXFLOW_DIR": str(REPOSITORY), "FLUXFLOW_ENV": environment, "OMP_NUM_THREADS": "1", **more}

    def wait_for_records(self, run: Path, count: int, job: str) -> None:
        """Until the run has recorded `count` more times than now."""
        before = records(run)
        wait_for(lambda: records(run) >= before + count, 90, f"{count} records of job {job}", self.cluster.log)

    def completed(self, job: str) -> dict[str, str]:
        return self.cluster.wait_until(job, "COMPLETED", timeout=180)


def records(run: Path) -> int:
    return len((run / "metrics.csv").read_text().splitlines()) if (run / "metrics.csv").exists() else 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def scalars(run: Path) -> list[str]:
    """The records, but for the clock."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    clock = lines[0].index("train/images_per_second")
    return [",".join(cells[:clock] + cells[clock + 1 :]) for cells in lines]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(f"SLURM: {missing()}")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, small: tuple[str, ...], data_root: Path, launch: Callable[..., int]) -> Jobs:
    own = (
        f"budget.images={IMAGES}",
        "scale.batch_size=8",
        "scale.log_every=32",
        "scale.validate_every=480",
        "scale.samples_every=480",
        "scale.checkpoint_every=320",
        "trainer.accelerator=cpu",
        "evaluate.split=null",
        f"data.root={data_root}",
    )
    trained = tuple(option for option in small if not option.startswith("trainer="))
    assert (
        launch(
            "fluxflow_train.prepare",
            "data=shapes",
            *(o for o in small if o.startswith(("data.num", "scale.res"))),
            f"data.root={data_root}",
        )
        == 0
    )
    return Jobs(cluster, ("+experiment=vae_bezier", "gan=patch", *trained, *own))


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two nodes make when nothing happens to them."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    jobs.completed(jobs.train(run))
    return run
