"""Properties of the order: a permutation each epoch, the same for any number of processes, from any point."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxflow_train.data.sampler import GlobalOrder, epoch_order, eval_batches

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)
SEEDS = st.integers(0, 2**32)
WINDOWS = st.integers(1, 10)


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
    alone = GlobalOrder(seed, sizes, window, size).batch(number)
    for world in (2, 4):
        parts = [GlobalOrder(seed, sizes, window, size).batch(number, rank, world) for rank in range(world)]
        assert list(itertools.chain.from_iterable(parts)) == alone


@settings(deadline=None)
@given(SEEDS, SHARDS, WINDOWS, st.integers(1, 30), st.integers(1, 20))
def test_every_sample_is_seen_equally(seed, sizes, window, size, batches):
    """Also where the epoch is smaller than a batch: no remainder is dropped, none is padded."""
    order = GlobalOrder(seed, sizes, window, size)
    pairs = [pair for number in range(batches) for pair in order.batch(number)]
    counts = Counter(sample for _, sample in pairs)
    assert max(counts.values()) - min(counts[sample] for sample in range(sum(sizes))) <= 1
    assert len(set(pairs)) == len(pairs) == size * batches
    assert [epoch for epoch, _ in pairs] == [position // sum(sizes) for position in range(len(pairs))]


@settings(deadline=None)
@given(SEEDS, SHARDS, WINDOWS, st.integers(1, 12), st.integers(0, 15))
def test_goes_on_from_any_batch(seed, sizes, window, size, start):
    straight = GlobalOrder(seed, sizes, window, size)
    expected = [straight.batch(number) for number in range(start + 3)][start:]
    fresh = GlobalOrder(seed, sizes, window, size)
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
        GlobalOrder(0, sizes, window, size)


def test_refuses_a_world_that_does_not_divide_the_batch():
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        GlobalOrder(0, [10], 1, 4).batch(0, 0, 3)
