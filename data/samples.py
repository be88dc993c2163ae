"""Samples by their position in the run: ask the order where they lie, then read them from the open shards."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest
from data.order import SampleOrder
from data.shard_reader import ShardReader


class SampleReader:
    """Reads samples of `seq_length` + 1 tokens and keeps the most recently used shards open."""

    def __init__(
        self, manifest: Manifest, split: str, seq_length: int, order: SampleOrder, max_open_shards: int
    ) -> None:
        self.seq_length = seq_length
        self._manifest = manifest
        self._shards = manifest.shards[split]
        self._order = order
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def read(self, positions: NDArray[np.int64]) -> NDArray:
        """The samples at `positions` of the run: an array [len(positions), seq_length + 1] of the shards' type."""
        place = self._order.locate(positions)
        by_shard = np.argsort(place.shard, kind="stable")
        shards, firsts = np.unique(place.shard[by_shard], return_index=True)
        samples = None
        for shard, rows in zip(shards, np.split(by_shard, firsts[1:]), strict=True):
            tokens = self._shard(int(shard)).rows(place.sample[rows] * self.seq_length, self.seq_length + 1)
            if samples is None:
                samples = np.empty((len(positions), self.seq_length + 1), dtype=tokens.dtype)
            samples[rows] = tokens
        assert samples is not None
        return samples

    def _shard(self, number: int) -> ShardReader:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._max_open_shards:
            self._open.popitem(last=False)[1].close()
        self._open[number] = ShardReader(self._manifest, self._shards[number])
        return self._open[number]
