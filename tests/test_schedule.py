import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxflow_train.schedule import ema_decay, ema_halflife, linear_warmup, warmup_cosine


@pytest.mark.parametrize(
    ("images_seen", "factor"),
    [(0, 0.0), (25, 0.5), (50, 1.0), (525, 0.55), (1000, 0.1), (5000, 0.1)],
)
def test_warmup_cosine_at_known_points(images_seen: int, factor: float) -> None:
    assert warmup_cosine(images_seen, 1000, warmup_fraction=0.05, final_fraction=0.1) == pytest.approx(factor)


def test_warmup_cosine_without_warmup_starts_at_one() -> None:
    assert warmup_cosine(0, 1000, warmup_fraction=0.0, final_fraction=0.0) == 1.0


def test_warmup_cosine_of_nothing_but_warmup() -> None:
    assert warmup_cosine(500, 1000, warmup_fraction=1.0, final_fraction=0.0) == 0.5


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1.5))
def test_warmup_cosine_stays_in_range_and_does_not_jump(budget: int, warmup: float, final: float, at: float) -> None:
    here, there = (warmup_cosine(budget * x, budget, warmup, final) for x in (at, max(at - 1e-9, 0)))
    assert 0 <= here <= 1
    if at > warmup:
        assert here >= final - 1e-12
    if 1e-3 < warmup < 1 - 1e-3:
        assert here == pytest.approx(there, abs=1e-5)


def test_linear_warmup() -> None:
    assert [linear_warmup(n, 10) for n in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    assert linear_warmup(0, 0) == 1


def test_ema_halflife_ramps_then_stays() -> None:
    assert [ema_halflife(n, 10_000) for n in (0, 1000, 20_000, 10**6)] == [0, 50, 1000, 1000]


def test_ema_decay_keeps_nothing_of_the_start() -> None:
    assert ema_decay(32, ema_halflife(0, 1000)) == 0.0


@given(st.floats(1, 1e6), st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_ema_decay_does_not_depend_on_the_batch_size(halflife: float, batches: list[int]) -> None:
    product = 1.0
    for batch in batches:
        product *= ema_decay(batch, halflife)
    assert product == pytest.approx(ema_decay(sum(batches), halflife), rel=1e-9, abs=1e-300)
    assert ema_decay(1, halflife) ** halflife == pytest.approx(0.5)
