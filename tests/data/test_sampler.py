"""Properties of the order: a permutation each epoch, the same for any number of processes, from any point."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxflow_train.data.line import STRETCH, Line, Part, apportion, epoch_order
from fluxflow_train.data.sampler import GlobalOrder, eval_batches

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)
SEEDS = st.integers(0, 2**32)
WINDOWS = st.integers(1, 10)


def order_of(seed: int, sizes: list[int], window: int, size: int) -> GlobalOrder:
    """One dataset, one bucket."""
    return GlobalOrder(Line(seed, [Part(sizes)], window), np.zeros(sum(sizes), int), size)


@given(SEEDS, st.integers(0, 1000), SHARDS, WINDOWS)
def test_each_epoch_is_a_permutation(seed, epoch, sizes, window):
    order = epoch_order(seed, epoch, sizes, window)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))


@given(SEEDS, st.lists(st.integers(1, 12), min_size=1, max_size=8), WINDOWS)
def test_a_window_holds_whole_shards(seed, sizes, window):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    shards = shard_of[epoch_order(seed, 0, sizes, window)]
    seen: list[int] = list(dict.fromkeys(shards.tolist()))
    start = 0
    for first in range(0, len(sizes), window):
        # The shards that come first are read to their end before any other is touched.
        inside = [s for s in seen if s in set(shards[start:].tolist())][:window]
        stop = start + sum(sizes[s] for s in inside)
        assert set(shards[start:stop].tolist()) == set(inside)
        assert len(inside) == min(window, len(sizes) - first)
        start = stop


@settings(deadline=None)
@given(SEEDS, SHARDS, WINDOWS, st.sampled_from([1, 2, 3]), st.integers(0, 20))
def test_processes_share_the_same_global_batches(seed, sizes, window, share, number):
    size = 4 * share
    alone = order_of(seed, sizes, window, size).batch(number)
    for world in (2, 4):
        parts = [order_of(seed, sizes, window, size).batch(number, rank, world) for rank in range(world)]
        assert list(itertools.chain.from_iterable(parts)) == alone


@settings(deadline=None)
@given(SEEDS, SHARDS, WINDOWS, st.integers(1, 30), st.integers(1, 20))
def test_every_sample_is_seen_equally(seed, sizes, window, size, batches):
    """Also where the epoch is smaller than a batch: no remainder is dropped, none is padded."""
    order = order_of(seed, sizes, window, size)
    pairs = [pair for number in range(batches) for pair in order.batch(number)]
    counts = Counter(sample for _, sample in pairs)
    assert max(counts.values()) - min(counts[sample] for sample in range(sum(sizes))) <= 1
    assert len(set(pairs)) == len(pairs) == size * batches
    assert [epoch for epoch, _ in pairs] == [position // sum(sizes) for position in range(len(pairs))]


@settings(deadline=None)
@given(SEEDS, SHARDS, WINDOWS, st.integers(1, 12), st.integers(0, 15))
def test_goes_on_from_any_batch(seed, sizes, window, size, start):
    straight = order_of(seed, sizes, window, size)
    expected = [straight.batch(number) for number in range(start + 3)][start:]
    fresh = order_of(seed, sizes, window, size)
    assert [fresh.batch(number) for number in range(start, start + 3)] == expected


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order(seed, epoch, [50, 50], 2)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_sees_each_sample_once(samples, size, world):
    batches = [batch for rank in range(world) for batch in eval_batches(samples, size, rank, world)]
    assert sorted(sample for batch in batches for _, sample in batch) == list(range(samples))
    assert all(0 < len(batch) <= max(1, size // world) for batch in batches)


@pytest.mark.parametrize(
    ("sizes", "window", "size", "text"),
    [([0], 1, 1, "samples: got 0"), ([1], 0, 1, "window_shards: got 0"), ([1], 1, 0, "batch_size: got 0")],
)
def test_refuses_what_gives_no_batches(sizes, window, size, text):
    with pytest.raises(ValueError, match=text):
        order_of(0, sizes, window, size)


def test_refuses_a_world_that_does_not_divide_the_batch():
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        order_of(0, [10], 1, 4).batch(0, 0, 3)


class TestMixture:
    def mixed(self, seed: int = 0) -> tuple[Line, np.ndarray]:
        """Two datasets of 40 and 300 samples with weights 3 and 1, and a bucket for each third sample."""
        return Line(seed, [Part([10, 30], 3.0), Part([100, 200], 1.0)], 2), np.arange(340) % 3 // 2

    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
    def test_apportion(self, weights):
        counts = apportion(weights, STRETCH)
        assert sum(counts) == STRETCH
        assert min(counts) >= 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - STRETCH * weight / sum(weights)) <= len(weights) + 1

    def test_every_dataset_has_its_share_and_its_own_epochs(self):
        line, _ = self.mixed()
        pairs = np.concatenate([line.stretch(number) for number in range(3)])
        first = pairs[pairs[:, 1] < 40]
        assert len(first) == 3 * STRETCH * 3 // 4
        for part, size in ((first, 40), (pairs[pairs[:, 1] >= 40], 300)):
            assert part[:, 0].tolist() == [position // size for position in range(len(part))]
            whole = part[: len(part) // size * size, 1].reshape(-1, size)
            assert all(len(set(epoch)) == size for epoch in whole.tolist())
        assert 0.6 < (pairs[:64, 1] < 40).mean() < 0.9  # mixed from the first batch on

    def test_a_batch_is_of_one_bucket_and_nothing_is_lost(self):
        line, bucket_of = self.mixed()
        order = GlobalOrder(line, bucket_of, 16)
        batches = [order.batch(number) for number in range(500)]
        assert all(len({bucket_of[sample] for _, sample in batch}) == 1 for batch in batches)
        pairs = [pair for batch in batches for pair in batch]
        assert len(set(pairs)) == len(pairs)
        there = set(pairs)
        seen = np.concatenate([line.stretch(number) for number in range(4)])[: 500 * 16].tolist()
        # Of what the line has had so far only what a batch of each bucket still waits for is missing.
        assert sum(tuple(pair) not in there for pair in seen) <= 2 * 16

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 3), st.integers(0, 900), st.sampled_from([4, 12, 100, 3000]))
    def test_goes_on_from_any_batch(self, seed, start, size):
        line, bucket_of = self.mixed(seed)
        start = start * 4 // size
        straight = GlobalOrder(line, bucket_of, size)
        expected = [straight.batch(number) for number in range(start + 3)][start:]
        fresh = GlobalOrder(self.mixed(seed)[0], bucket_of, size)
        assert [fresh.batch(number) for number in range(start, start + 3)] == expected
        assert [fresh.batch(number, 1, 4) for number in (start + 2, start)] == [
            expected[number][size // 4 : size // 2] for number in (2, 0)
        ]

    def test_a_rare_bucket_waits_over_many_stretches(self):
        line = Line(0, [Part([5000])], 1)
        bucket_of = (np.arange(5000) < 3).astype(int)  # 3 in 5,000: a batch of 8 takes over 13,000 samples
        straight, start = GlobalOrder(line, bucket_of, 8), 0
        while not all(bucket_of[sample] for _, sample in straight.batch(start)):
            start += 1
        assert start * 8 > 13_000
        assert GlobalOrder(line, bucket_of, 8).batch(start) == straight.batch(start)

    @pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    def test_refuses_weights_that_are_none(self, weights):
        with pytest.raises(ValueError, match="weights: got"):
            apportion(weights, 10)
