"""KID of independent sets and its interval, against loops and known answers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.metrics.kid import ROWS, half_masks, kid_interval, kid_of_sets, kid_of_subsets


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(real: Tensor, fake: Tensor) -> float:
    x, y = real.double().numpy(), fake.double().numpy()

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z: np.ndarray) -> float:
        return float(np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]))

    return within(x) + within(y) - 2 * float(np.mean([k(a, b) for a in x for b in y]))


def test_sets_of_any_size_equal_a_naive_loop() -> None:
    x, y = normal(11, 5), normal(7, 5, seed=1) + 0.3
    assert kid_of_sets(x, y) == pytest.approx(naive(x, y), rel=1e-12)


def test_subsets_equal_their_own_distances() -> None:
    x, y = normal(12, 5), normal(9, 5, seed=1)
    draw = rng.generator(0, "test")
    masks = [half_masks(len(z), draw)[:, :4] for z in (x, y)]
    expected = [naive(x[masks[0][:, s] == 1], y[masks[1][:, s] == 1]) for s in range(4)]
    assert kid_of_subsets(x, y, *masks).tolist() == pytest.approx(expected, rel=1e-11)


def test_pieces_do_not_change_the_value() -> None:
    x, y = normal(ROWS + 3, 4), normal(ROWS - 5, 4, seed=1) + 0.2
    kernel = [((a.double() @ b.double().T) / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    n, m = len(x), len(y)
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    assert kid_of_sets(x, y) == pytest.approx(float(within[0] + within[1] - 2 * kernel[2].sum() / (n * m)), rel=1e-9)


def test_halves_have_half_of_each_set_once() -> None:
    masks = half_masks(9, rng.generator(0, "test"))
    assert masks.sum(0).tolist() == [4] * masks.shape[1] and set(masks.unique().tolist()) == {0, 1}
    assert len(masks.unique(dim=1).T) > 60  # of 126


def test_unbiased_for_one_distribution() -> None:
    values = [kid_of_sets(normal(30, 4, seed=2 * i), normal(40, 4, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5


@pytest.mark.parametrize(("scale", "shift", "widest"), [(1.0, 0.0, 2.5), (1.2, 0.5, 1.3)], ids=["same", "distant"])
def test_interval_covers(scale: float, shift: float, widest: float) -> None:
    """80 draws: at least 70 hold the mean, and the width is at most `widest` that of the estimator's own spread."""
    rows = []
    for i in range(80):
        x, y = normal(60, 8, seed=2 * i), normal(90, 8, seed=2 * i + 1) * scale + shift
        rows.append((kid_of_sets(x, y), *kid_interval(x, y, rng.generator(0, "test", i))))
    value, low, high = np.array(rows).T
    true = 0.0 if shift == 0 else value.mean()
    assert ((low <= true) & (true <= high)).sum() >= 70
    assert 0.8 < np.mean(high - low) / (2 * 1.96 * np.std(value)) < widest


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 5"):
        kid_of_sets(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="got 5, 3"):
        kid_interval(normal(5, 3), normal(3, 3), rng.generator(0, "test"))
