"""Samples by their position in the run: ask the order where they lie, then read them from the open shards.

Damage. A damaged copy in the cache is fetched again. Damage in the original stops the run (on_damage "stop"), or leaves
out the whole shard ("skip"): then every shard is checked in full before its first sample is used, so that all ranks
come to the same decision by themselves, and sample s of a damaged shard is replaced by sample s mod n of the next sound
shard of n samples in the manifest. Counts and positions stay as they were, so ranks stay in step and a resumed run sees
the same. Trouble that one rank may have alone (its network, its disk, its limits) is never damage: it is tried again,
and stops the run if it lasts.
"""

import logging
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from data.errors import DamagedShardError, DamagedShardFileError, DataError
from data.fetch.fetcher import ShardFetcher
from data.fetch.sources import ReadOptions
from data.shards.manifest import Manifest, ShardInfo
from data.shards.text_shard import TextShard
from data.shards.token_shard import TokenShard
from data.stream.order import SampleOrder

_log = logging.getLogger(__name__)


def open_shard(manifest: Manifest, shard: ShardInfo) -> TokenShard | TextShard:
    """Open a shard of either kind; raises DamagedShardError if it is not there in its full size."""
    return TokenShard(manifest, shard) if manifest.content == "tokens" else TextShard(manifest, shard)


class SampleReader:
    """Reads samples of `seq_length` + 1 tokens of one dataset and keeps the most recently used shards open.

    `window_shards` shards are in use at a time; as many again are fetched ahead and stay open.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        seq_length: int,
        order: SampleOrder,
        window_shards: int,
        options: ReadOptions,
    ) -> None:
        self.order = order
        self._seq_length = seq_length
        self._manifest = manifest
        self._shards = manifest.shards[split]
        self._options = options
        self._num_open = 2 * window_shards
        self._open: OrderedDict[int, TokenShard | TextShard] = OrderedDict()
        self._damaged: set[int] = set()
        self._fetcher: ShardFetcher | None = None

    @property
    def cached_bytes(self) -> int:
        """Room in the cache for the shards in use or fetched ahead, at most."""
        if not self._manifest.shard_source.is_remote:
            return 0
        return sum(sorted(shard.num_bytes for shard in self._shards)[-self._num_open :])

    def read(self, positions: NDArray[np.int64]) -> NDArray:
        """The samples at `positions` of the run: an array [len(positions), seq_length + 1] of the shards' type."""
        if self._manifest.shard_source.is_remote:
            self._fetch_ahead(int(positions.max()))
        place = self.order.locate(positions)
        by_shard = np.argsort(place.shard, kind="stable")
        shards, firsts = np.unique(place.shard[by_shard], return_index=True)
        samples = np.empty((len(positions), self._seq_length + 1), dtype=self._manifest.token_dtype)
        for shard, rows in zip(shards, np.split(by_shard, firsts[1:]), strict=True):
            samples[rows] = self._rows(int(shard), place.sample[rows])
        return samples

    def locate(self, position: int) -> tuple[Manifest, ShardInfo, int]:
        """The dataset, shard and sample number that `position` is read from; replacements count once they were made."""
        place = self.order.locate(np.array([position]))
        shard, sample = self._replacement(int(place.shard[0]), place.sample)
        return self._manifest, self._shards[shard], int(sample[0])

    def close(self) -> None:
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None
        while self._open:
            self._open.popitem()[1].close()

    def _rows(self, shard: int, samples: NDArray[np.int64]) -> NDArray:
        while True:
            shard, samples = self._replacement(shard, samples)
            try:
                return self._sound_rows(shard, samples)
            except DamagedShardError as error:
                if self._options.on_damage == "stop":
                    raise
                _log.warning("shard left out, samples of others take the place of its own: %s", error)
                self._damaged.add(shard)

    def _replacement(self, shard: int, samples: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """Step from damaged shards to the next until a sound one; the way there does not depend on what was read."""
        while shard in self._damaged:
            if len(self._damaged) == len(self._shards):
                where = self._manifest.source.describe("")
                raise DataError(f"{where}: every shard is damaged or shorter than a sample; copy the dataset again")
            shard = (shard + 1) % len(self._shards)
            num_samples = self._shards[shard].num_samples(self._seq_length)
            if num_samples:
                samples = samples % num_samples
            else:
                self._damaged.add(shard)
        return shard, samples

    def _sound_rows(self, shard: int, samples: NDArray[np.int64]) -> NDArray:
        """Raises DamagedShardError only for the original: ranks have caches of their own, or clear the same one."""
        source, info = self._manifest.shard_source, self._shards[shard]
        try:
            return self._read_rows(shard, samples)
        except DamagedShardFileError:
            self._let_go(shard)
            if not source.is_remote:
                raise
            source.forget(info.sha256)
        try:
            return self._read_rows(shard, samples)
        except DamagedShardFileError as error:
            raise DataError(
                f"{source.describe(info.name)}: its copy in {self._options.cache_dir} is damaged or gone as soon as it "
                f"is fetched ({error}); check that disk, or raise cache_gigabytes if other runs use it too"
            ) from error

    def _read_rows(self, shard: int, samples: NDArray[np.int64]) -> NDArray:
        """Raises DataError, whatever the policy, for a token that no embedding has: the dataset contradicts itself."""
        rows = self._shard(shard).rows(samples * self._seq_length, self._seq_length + 1)
        if rows.max() >= self._manifest.vocab_size:
            where = self._manifest.shard_source.describe(self._shards[shard].name)
            raise DataError(
                f"{where}: holds token {rows.max()}, but the manifest's vocab_size is {self._manifest.vocab_size}; "
                "prepare the dataset again"
            )
        return rows

    def _shard(self, number: int) -> TokenShard | TextShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._num_open:
            self._open.popitem(last=False)[1].close()
        shard = open_shard(self._manifest, self._shards[number])
        if self._options.on_damage == "skip":
            shard.verify_all()
        self._open[number] = shard
        return shard

    def _let_go(self, number: int) -> None:
        if number in self._open:
            self._open.pop(number).close()

    def _fetch_ahead(self, position: int) -> None:
        """Ask for the shards of this window and the next; `read` waits for those it needs through the cache's locks."""
        if self._fetcher is None:
            self._fetcher = ShardFetcher(self._fetch)
        self._fetcher.ask(self.order.shards_after(position, self._num_open))

    def _fetch(self, number: int) -> None:
        shard = self._shards[number]
        self._manifest.shard_source.fetch(shard.name, shard.sha256, shard.num_bytes)
