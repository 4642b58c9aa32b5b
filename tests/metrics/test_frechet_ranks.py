"""1, 2 and 4 gloo ranks: one N and one value on all of them, however the images are shared out.

Run as a program, this file is one rank: `python test_frechet_ranks.py FOLDER RANK`.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.metrics.fid import frechet_value
from fluxflow_train.metrics.frechet import all_reduce, frechet, gaussian, moments
from fluxflow_train.metrics.frechet_infinity import frechet_infinity
from fluxflow_train.metrics.kid import kid_interval

WORLDS = (1, 2, 4)
WIDTH = 8
TOTALS = {"divides": 96, "does_not_divide": 97, "one_rank_empty": 90}


def features(num: int, seed: int) -> Tensor:
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + 100


def share(case: str, rank: int, world: int) -> Tensor:
    """A rank's images of a case; the last of several has none in `one_rank_empty`."""
    workers = world - 1 if case == "one_rank_empty" and world > 1 else world
    whole = features(TOTALS[case], seed=1)
    return whole[rank::workers] if rank < workers else whole[:0]


def measure(case: str, rank: int, world: int) -> dict[str, Any]:
    real, fake = features(120, seed=0), features(TOTALS[case], seed=1)
    reference = moments(real, real[0])
    reduced = all_reduce(moments(share(case, rank, world), real[0]))
    distance = frechet(reference.mean, reference.covariance, reduced.mean, reduced.covariance)
    return {
        "count": reduced.count,
        "mean": reduced.mean.tolist(),
        "frechet": distance.value,
        "stored": [  # what every rank computes alone from the same stored features
            frechet_value(real, fake).value,
            frechet_infinity(reference, fake, rng.generator(0, "test")).interval,
            kid_interval(real, fake, rng.generator(0, "test")),
        ],
    }


def run_rank(folder: Path, rank: int) -> None:
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo", f"file://{folder / f'group{world}'}", timedelta(seconds=60), world_size=world, rank=rank
        )
        measured = {case: measure(case, rank, world) for case in TOTALS}
        dist.destroy_process_group()
        (folder / f"{world}-{rank}.json").write_text(json.dumps(measured))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world measured."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], env=environment)
        for rank in range(max(WORLDS))
    ]
    try:
        assert [process.wait(timeout=100) for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()
    return {
        world: [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)] for world in WORLDS
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", TOTALS)
def test_every_rank_has_all_images_and_one_value(
    measured: dict[int, list[dict[str, Any]]], case: str, world: int
) -> None:
    results = [rank[case] for rank in measured[world]]
    assert all(result == results[0] for result in results)
    fake = features(TOTALS[case], seed=1)
    assert results[0]["count"] == TOTALS[case]
    assert results[0]["mean"] == pytest.approx(fake.double().mean(0).tolist(), rel=1e-11)
    alone = frechet(*gaussian(features(120, seed=0)), *gaussian(fake)).value
    assert results[0]["frechet"] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("case", TOTALS)
def test_stored_features_give_the_same_in_any_world(measured: dict[int, list[dict[str, Any]]], case: str) -> None:
    """torchmetrics would add up the ranks' copies of the same features, if it synchronised."""
    alone = json.loads(json.dumps(measure(case, 0, 1)["stored"]))
    for world in WORLDS:
        value, infinity, kernel = measured[world][0][case]["stored"]
        assert value == pytest.approx(alone[0], rel=1e-9)
        assert infinity == pytest.approx(alone[1], rel=1e-9)
        assert kernel == pytest.approx(alone[2], rel=1e-9)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
