"""Test that the order of samples is a permutation and does not depend on how it is asked for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.order import SampleOrder, permute

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(st.integers(1, 3000), st.integers())
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, str(key))) == list(range(size))


@given(st.integers(50, 2000))
@settings(max_examples=20, deadline=None)
def test_permute_depends_on_the_key_and_scatters(size: int) -> None:
    one, other = (permute(np.arange(size), size, key) for key in ("a", "b"))
    assert (one != other).mean() > 0.8
    assert (np.diff(one) == 1).mean() < 0.2


def test_places_are_uniform() -> None:
    """Count where 8 items land over 4000 keys; chi-squared (7 degrees of freedom) is below its 1 - 10^-6 quantile."""
    landed = np.stack([permute(np.arange(8), 8, str(key)) for key in range(4000)])
    for item in landed.T:
        counts = np.bincount(item, minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 40.5


@given(sizes, st.integers(0, 5), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_every_sample_once(sizes: list[int], seed: int, window_shards: int) -> None:
    total = sum(sizes)
    place = SampleOrder(sizes, seed, window_shards).locate(np.arange(3 * total))
    everything = sorted((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))
    for epoch in range(3):
        here = slice(epoch * total, (epoch + 1) * total)
        assert set(place.epoch[here]) == {epoch}
        assert sorted(zip(place.shard[here], place.sample[here], strict=True)) == everything


@given(sizes, st.lists(st.integers(0, 200), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_position_means_the_same_whatever_is_asked_with_it(sizes: list[int], positions: list[int]) -> None:
    together = SampleOrder(sizes, 1, 2).locate(np.array(positions))
    for i, position in enumerate(positions):
        alone = SampleOrder(sizes, 1, 2).locate(np.array([position]))
        assert [field[0] for field in alone] == [field[i] for field in together]


def test_epochs_and_seeds_differ_and_windows_bound_the_shards_in_use() -> None:
    sizes = [50] * 12
    order = SampleOrder(sizes, 1, 3)
    place = order.locate(np.arange(1200))
    assert not np.array_equal(place.sample[:600], place.sample[600:])
    assert not np.array_equal(place.sample, SampleOrder(sizes, 2, 3).locate(np.arange(1200)).sample)
    for window in range(8):
        assert len(set(place.shard[window * 150 : (window + 1) * 150])) == 3
    assert set(order.shards_after(160, 3)) == set(place.shard[150:300])


def test_without_shuffling_the_order_is_the_manifests() -> None:
    place = SampleOrder([2, 0, 3], 0, 8, shuffle=False).locate(np.arange(5))
    assert list(place.shard) == [0, 0, 2, 2, 2]
    assert list(place.sample) == [0, 1, 0, 1, 2]


def test_the_order_does_not_change_between_releases() -> None:
    """These numbers may never change, since later versions resume today's runs."""
    place = SampleOrder([3, 2, 4, 3, 2], 7, 2).locate(np.arange(16))
    assert list(zip(place.shard.tolist(), place.sample.tolist(), strict=True)) == [
        (3, 1),
        (3, 0),
        (2, 2),
        (3, 2),
        (2, 0),
        (2, 3),
        (2, 1),
        (4, 0),
        (0, 0),
        (0, 2),
        (0, 1),
        (4, 1),
        (1, 1),
        (1, 0),
        (1, 1),
        (3, 1),
    ]
