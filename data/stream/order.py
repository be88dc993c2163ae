"""Compute the order of samples: position n -> (epoch, shard, sample in shard).

This is pure arithmetic. It keeps no state, and no permutation of an epoch in memory.

Worked example: 5 shards of 3, 2, 4, 3 and 2 samples, windows of 2 shards, seed 7.

    epoch 0  shards sorted by a keyed hash:            3   2  |  0   4  |  1
             samples in them:                          3 + 4  |  3 + 2  |  2        = 14 an epoch
             positions:                                0 .. 6 | 7 .. 11 | 12 13
    position 9  is offset 9 of epoch 0, place 2 of window 1, whose samples are (0,0) (0,1) (0,2) (4,0) (4,1)
             the window's keyed permutation of 0 .. 4 takes place 2 to 2: shard 0, sample 2
    position 14 is offset 0 of epoch 1, whose shards and windows are shuffled with other keys

A batch of 4 at position 12 takes two samples of epoch 0 and two of epoch 1, so no tail is dropped. The result does not
depend on the rank, the number of ranks or earlier reads. A resumed run therefore needs only the position.

Samples are shuffled within a window, so a stretch of training reads only `window_shards` files. Shards are assigned to
windows at random, anew in each epoch. The permutation is a Feistel network over the next power of two. It is applied
again while the result is out of range (cycle walking), so it takes O(1) time per position and no memory.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROUNDS = 6
_MIN_BITS = 4


class Place(NamedTuple):
    """Where samples lie: epoch, shard number in the manifest, and sample number in the shard. All arrays are [N]."""

    epoch: Ints
    shard: Ints
    sample: Ints


class SampleOrder:
    """The infinite sequence of samples over the shards of one split.

    Args:
        samples_per_shard: Number of samples of each shard, in the manifest's order.
        seed: Key of every shuffle.
        window_shards: How many shards are shuffled together.
        shuffle: If False, samples keep the manifest's order.
    """

    def __init__(
        self, samples_per_shard: Sequence[int], seed: int | str, window_shards: int, shuffle: bool = True
    ) -> None:
        self._sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self._shuffle = shuffle
        self.samples_per_epoch = int(self._sizes.sum())
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, positions: Ints) -> Place:
        """Return where the samples at `positions` of the run lie. The shards must hold at least one sample."""
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        shard = np.empty_like(positions)
        sample = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shard[here], sample[here] = self._epoch(int(epoch)).locate(offsets[here])
        return Place(epochs, shard, sample)

    def shards_after(self, position: int, count: int) -> list[int]:
        """Return the next `count` shards to be read, from the window of `position` on; used to fetch ahead."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        upcoming: list[int] = []
        while len(upcoming) < count and len(upcoming) < len(self._sizes):
            upcoming += self._epoch(epoch).shards_from(offset, count)
            epoch, offset = epoch + 1, 0
        return upcoming[:count]

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch touches two epochs at most, unless epochs are tiny
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(self._sizes, self._seed, epoch, self._window_shards, self._shuffle)
        return self._epochs[epoch]


class _Epoch:
    """The sequence of shards of one epoch. Memory is a few numbers per shard."""

    def __init__(self, sizes: Ints, seed: int | str, epoch: int, window_shards: int, shuffle: bool) -> None:
        self._key = f"{seed}/{epoch}"
        self._shuffle = shuffle
        self._window_shards = window_shards
        self._shards = np.arange(len(sizes))
        if shuffle:
            hashes = _mix(self._shards.astype(np.uint64) ^ _key64(f"{self._key}/shards"))
            self._shards = np.argsort(hashes, kind="stable")
        self._ends = np.cumsum(sizes[self._shards])
        self._starts = self._ends - sizes[self._shards]
        self._window_starts = self._starts[::window_shards]
        self._window_ends = np.append(self._window_starts[1:], self._ends[-1])

    def locate(self, offsets: Ints) -> tuple[Ints, Ints]:
        if self._shuffle:
            offsets = self._shuffled(offsets)
        slot = np.searchsorted(self._ends, offsets, side="right")
        return self._shards[slot], offsets - self._starts[slot]

    def shards_from(self, offset: int, count: int) -> list[int]:
        first_window = int(np.searchsorted(self._window_ends, offset, side="right"))
        first = first_window * self._window_shards
        return self._shards[first : first + count].tolist()

    def _shuffled(self, offsets: Ints) -> Ints:
        windows = np.searchsorted(self._window_ends, offsets, side="right")
        result = np.empty_like(offsets)
        for window in np.unique(windows):
            here = windows == window
            start, end = int(self._window_starts[window]), int(self._window_ends[window])
            result[here] = start + permute(offsets[here] - start, end - start, f"{self._key}/window/{window}")
        return result


def permute(index: Ints, size: int, key: str) -> Ints:
    """Apply the keyed permutation of 0 .. size-1 to each element of `index`."""
    bits = max(_MIN_BITS, (size - 1).bit_length())
    round_keys = [_key64(f"{key}/round/{i}") for i in range(_ROUNDS)]
    result = _feistel(index.astype(np.uint64), bits, round_keys)
    while True:
        outside = np.flatnonzero(result >= size)
        if not len(outside):
            return result.astype(np.int64)
        result[outside] = _feistel(result[outside], bits, round_keys)


def _feistel(value: NDArray[np.uint64], bits: int, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    """Apply a bijection of 0 .. 2^bits - 1, whose rounds each mix one half of the bits into the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    low, high = value & low_mask, value >> low_bits
    for i, key in enumerate(round_keys):
        if i % 2:
            low = low ^ (_mix(high ^ key) & low_mask)
        else:
            high = high ^ (_mix(low ^ key) & high_mask)
    return (high << low_bits) | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64, by which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key64(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
