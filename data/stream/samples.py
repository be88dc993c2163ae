"""Read samples by their position in the run: look up where they lie, then read them from the open shards.

What happens to a damaged file depends on where the damage is:

- A damaged copy in the cache is fetched again.
- A damaged original stops the run if on_damage is "stop".
- With on_damage "skip", a damaged original is left out as a whole. Sample s of a damaged shard is replaced by sample
  s mod n of the manifest's next sound shard, which has n samples. Counts and positions do not change, so ranks stay in
  step and a resumed run sees the same samples. Each shard is checked in full before its first sample is used, so all
  ranks decide alike without communicating.
- A fault that may concern one rank alone (its network, disk or limits) is not damage. The read is retried, and the run
  stops if the fault persists.
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
    """Open a shard of tokens or of text; raise DamagedShardError if the file is missing or has another size."""
    return TokenShard(manifest, shard) if manifest.content == "tokens" else TextShard(manifest, shard)


class SampleReader:
    """Read samples of one dataset, [seq_length + 1] tokens each, and keep the most recently used shards open.

    `window_shards` shards are in use at a time. As many again are fetched ahead and stay open.
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
        """The most bytes that the shards in use or fetched ahead take in the cache; 0 for a local dataset."""
        if not self._manifest.shard_source.is_remote:
            return 0
        return sum(sorted(shard.num_bytes for shard in self._shards)[-self._num_open :])

    def read(self, positions: NDArray[np.int64]) -> NDArray:
        """Return the samples at `positions` of the run, [len(positions), seq_length + 1], in the shards' dtype."""
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
        """Return the dataset, shard and sample number that `position` is read from.

        A replacement for a damaged shard is known only after `read` found the damage.
        """
        place = self.order.locate(np.array([position]))
        shard, sample = self._replacement(int(place.shard[0]), place.sample)
        return self._manifest, self._shards[shard], int(sample[0])

    def close(self) -> None:
        """Stop fetching ahead and close the shards."""
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
                _log.warning("shard left out; samples of other shards replace its own: %s", error)
                self._damaged.add(shard)

    def _replacement(self, shard: int, samples: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """Step to the next sound shard. The result does not depend on what was read before."""
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
        """Read rows and repair the cache; raise DamagedShardError only if the original is damaged.

        Every rank finds the same original, but a damaged cached copy concerns one machine alone.
        """
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
                f"{source.describe(info.name)}: its copy in {self._options.cache_folder} is damaged or gone as soon as "
                f"it is fetched ({error}); check that disk, or raise cache_gigabytes if other runs use it too"
            ) from error

    def _read_rows(self, shard: int, samples: NDArray[np.int64]) -> NDArray:
        """Read rows; raise DataError for a token outside the vocabulary, whatever `on_damage` says."""
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
        """Request the shards of this window and the next. The cache's locks make `read` wait for those it needs."""
        if self._fetcher is None:
            self._fetcher = ShardFetcher(self._fetch)
        self._fetcher.ask(self.order.shards_after(position, self._num_open))

    def _fetch(self, number: int) -> None:
        shard = self._shards[number]
        self._manifest.shard_source.fetch(shard.name, shard.sha256, shard.num_bytes)
