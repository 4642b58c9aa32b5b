from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.evaluation.checks import (
    estimator_checks,
    fingerprint_check,
    reference_checks,
    sample_checks,
    status_of,
)
from fluxflow_train.evaluation.reference import Real, RealFeatures, degraded
from fluxflow_train.evaluation.results import distances, paired_distances, yardsticks
from fluxflow_train.evaluation.samples import num_different, picture_digests
from fluxflow_train.metrics.extractor import Extractor, state_sha256
from fluxflow_train.metrics.frechet import fit_projection, frechet_of_features
from fluxflow_train.metrics.kid import kid_of_sets
from fluxflow_train.metrics.module_extractor import ModuleExtractor


def extractor(side: int) -> ModuleExtractor:
    """3 side^2 features."""
    module = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return ModuleExtractor(module, "pooled", 8, "tm-aa", [0.5] * 3, [0.25] * 3, state_sha256({}))


def draw(num: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)) * spread + 1


def real_of(reference: Tensor, rough: Tensor, train: Tensor) -> Real:
    images: Any = None
    return Real(*(RealFeatures(x, "", images, []) for x in (reference,)), rough, RealFeatures(train, "", images, []))


def by_name(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in results}


def test_large_sets_have_a_frechet_distance_and_its_limit() -> None:
    real, fake, rough = draw(60, 3, 0), draw(40, 3, 1, 1.5), draw(60, 3, 2, 4)
    found = distances(extractor(1), real_of(real, rough, real), fake, seed=0)
    results = by_name(found.results)
    entry = results["frechet_pooled"]
    assert entry["raw"] == pytest.approx(frechet_of_features(real, fake).value, rel=1e-6)
    assert (entry["n_real"], entry["n_fake"], entry["baseline_of"]) == (60, 40, None)
    assert results["frechet_pooled_degraded"]["raw"] == pytest.approx(frechet_of_features(real, rough).value, rel=1e-6)
    assert results["frechet_pooled_noise_floor"]["raw"] == pytest.approx(
        frechet_of_features(real[:30], real[30:]).value, rel=1e-6
    )
    low, high = results["frechet_pooled_infinity"]["interval"]
    assert low < results["frechet_pooled_infinity"]["raw"] < high
    assert found.by_size is not None and found.by_size["sizes"][-1] == 40 and len(found.by_size["values"]) == 15
    assert results["kid_pooled"]["raw"] == pytest.approx(kid_of_sets(real, fake), rel=1e-9)
    assert {"precision", "recall", "density", "coverage", "precision_noise_floor"} <= results.keys()
    assert not found.warnings and "fid" not in results
    assert all(c["passed"] for c in estimator_checks(found, "kid_pooled"))


def test_small_sets_have_one_on_components_of_training_features() -> None:
    width = 192
    real, fake, train = draw(400, width, 0), draw(330, width, 1, 2), draw(600, width, 2)
    found = distances(extractor(8), real_of(real, real, train), fake, seed=0)
    results = by_name(found.results)
    projection = fit_projection(train[:512], 64)
    expected = frechet_of_features(projection(real), projection(fake)).value
    assert results["frechet_pca64_pooled"]["raw"] == pytest.approx(expected, rel=1e-6)
    assert "frechet_pooled" not in results and not any("infinity" in name for name in results)
    assert found.by_size is None
    assert "frechet_pca64_pooled_noise_floor" not in results  # halves of 200 are fewer than 5 x 64
    assert "64 components" in found.warnings[0]


def test_smaller_sets_have_none() -> None:
    real, fake = draw(60, 192, 0), draw(50, 192, 1)
    found = distances(extractor(8), real_of(real, real, real), fake, seed=0)
    assert not any("frechet" in entry["name"] for entry in found.results)
    assert "use KID" in found.warnings[0] and found.value("kid_pooled") is not None


def test_reconstructions_are_compared_pair_by_pair() -> None:
    real = draw(60, 3, 0)
    fake, rough = real + 0.3 * draw(60, 3, 1), real + draw(60, 3, 2)
    found = paired_distances(extractor(1), real_of(real, rough, real), fake, seed=0)
    results = by_name(found.results)
    expected = (real.double() - fake.double()).norm(dim=1).mean()
    assert results["paired_distance_pooled"]["raw"] == pytest.approx(float(expected), rel=1e-9)
    assert results["paired_distance_pooled_degraded"]["raw"] > results["paired_distance_pooled"]["raw"]
    assert "frechet_pooled" in results and "frechet_pooled_infinity" not in results and "precision" not in results


def test_a_copy_is_at_distance_0() -> None:
    real = draw(60, 3, 0)
    results = by_name(paired_distances(extractor(1), real_of(real, real, real), real.clone(), seed=0).results)
    assert results["paired_distance_pooled"]["raw"] == results["kid_pooled"]["raw"] == 0
    assert abs(results["frechet_pooled"]["raw"]) < 1e-6


@pytest.mark.parametrize(("num_real", "num_fake", "size"), [(100, 30, 30), (100, 50, 50), (101, 80, 50), (1, 1, 0)])
def test_the_noise_floor_is_of_disjoint_sets(num_real: int, num_fake: int, size: int) -> None:
    real = torch.arange(num_real)[:, None].float()
    a, b = yardsticks(real, real, num_fake).noise_floor
    assert len(a) == len(b) == size and not set(a.flatten().tolist()) & set(b.flatten().tolist())


def test_degraded_images_keep_their_size_and_lose_their_detail() -> None:
    image = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rough = degraded(image)
    assert rough.shape == image.shape and rough.dtype == torch.uint8
    assert rough.float().var() < image.float().var() / 4
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(degraded(flat), flat)


# ---- checks ----


def rows(num: int) -> dict[str, Tensor]:
    images = torch.arange(num)[:, None, None, None].expand(num, 3, 2, 2).byte()
    return {
        "features": torch.zeros(num, 3),
        "nonfinite": torch.zeros(num, dtype=torch.bool),
        "constant": torch.zeros(num, dtype=torch.bool),
        "sha256": picture_digests(images),
    }


def failed(checks: list[dict[str, Any]]) -> list[str]:
    return [check["name"] for check in checks if not check["passed"]]


def test_every_check_of_pictures_can_fail() -> None:
    good = rows(8)
    assert failed(sample_checks(good, 8)) == []
    assert failed(sample_checks(good, 9)) == ["every image once"]
    one = torch.zeros(8, dtype=torch.bool)
    one[3] = True
    assert failed(sample_checks(good | {"nonfinite": one}, 8)) == ["finite outputs"]
    assert failed(sample_checks(good | {"features": torch.full((8, 3), torch.nan)}, 8)) == ["finite outputs"]
    assert failed(sample_checks(good | {"constant": one}, 8)) == ["no constant pictures"]
    twice = good["sha256"][[0, 0, 2, 3, 4, 5, 6, 7]]
    assert failed(sample_checks(good | {"sha256": twice}, 8)) == ["no picture twice"]
    assert (
        failed(sample_checks(good | {"sha256": twice, "input_sha256": twice}, 8)) == []
    )  # of an input that came twice
    assert num_different(twice) == 7


def test_the_other_checks_can_fail() -> None:
    assert failed([fingerprint_check([1.0, 2.0], [1.0, 2.0])]) == []
    assert len(failed([fingerprint_check([1.0, 2.0], [1.0, 2.01])])) == 1
    assert failed(reference_checks(draw(50, 3, 0))) == []
    real, fake = draw(80, 3, 0), draw(80, 3, 1)
    found = distances(extractor(1), real_of(real, draw(80, 3, 2, 4), real), fake, seed=0)
    found.cross_checks.append((1.0, 0.1))
    assert failed(estimator_checks(found, "kid_pooled")) == ["Frechet distance by another route"]
    uneven = torch.cat([real[:40], real[40:] + 50])
    found = distances(extractor(1), real_of(uneven, uneven, uneven), fake, seed=0)
    assert failed(estimator_checks(found, "kid_pooled")) == [
        "real images are nearer to real ones than to degraded ones"
    ]


def test_status() -> None:
    network: Extractor = extractor(1)
    passed: dict[str, Any] = {"name": "x", "passed": True, "detail": ""}
    assert status_of([passed], {}, network, 100, 100) == ("final", [])
    assert status_of([passed], {}, network, 99, 100)[0] == "partial"
    assert status_of([passed], {}, network, 10, 10)[0] == "partial"
    assert status_of([passed | {"passed": False}], {}, network, 100, 100)[0] == "smoke"
    assert status_of([passed], {"images_seen": 0}, network, 100, 100)[0] == "smoke"
    network.is_random = True
    status, reasons = status_of([passed], {}, network, 100, 100)
    assert status == "smoke" and "NOT AN FID" in reasons[0]
