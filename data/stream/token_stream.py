"""Micro-batches of tokens for one data-parallel rank, in an order that no rank count and no restart changes.

Worked example: two ranks, micro_batch_size 2, started at position 8 of the run's sequence of samples
(data/stream/order.py).

    next() number      1        2        3
    rank 0 reads     8  9    12 13    16 17
    rank 1 reads    10 11    14 15    18 19        samples_consumed afterwards: 12, 16, 20

A checkpoint keeps `samples_consumed`, a number of the whole run. Three ranks of micro-batch 1 that resume at 16 read
16, 17 and 18 first: each sample is read exactly once an epoch whatever the layouts before and after.

All tensor- and pipeline-parallel ranks of one replica pass the same data_parallel_rank and so see the same
micro-batches.
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.shards.manifest import SPLITS, Manifest
from data.stream.dataset import open_dataset
from data.stream.document_starts import document_starts
from data.stream.mixture import ConcatenatedOrder, MixtureOrder, MixtureReader
from data.stream.order import SampleOrder
from data.stream.samples import SampleReader

DEFAULT_WINDOW_SHARDS = 8
_TOKENS_PER_READ = 1 << 20
_SAMPLES_PER_READ = 8192
_LONGEST_STOP_S = 5.0


class TokenStream:
    """Iterator over int64 arrays [micro_batch_size, seq_length + 1]: inputs are [:, :-1], labels [:, 1:].

    split "train" is shuffled and never ends: what is left of an epoch opens the next batch. split "validation" is read
    in the manifest's order, once: every rank gets `num_batches` micro-batches, and of the rows of the last returned one
    the first `valid_rows` count; the others repeat the split's last sample and belong in no average. `limit_samples`
    reads only that many samples from the start of the validation split.

    Where `within_documents` is set, `document_starts` of the batch returned last are [micro_batch_size, seq_length]
    (data/stream/document_starts.py), else None.

    A background thread reads ahead; what it raises comes out of `next`. Memory is at most `prefetch` micro-batches of
    int64, 4 MiB, and 17 bytes for every 16 KiB of the shards that are open (two windows). `wait_s` is the time in
    seconds that `next` has spent waiting.
    """

    def __init__(
        self,
        dataset: str | Path | Manifest,
        split: str,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        samples_consumed: int = 0,
        *,
        limit_samples: int | None = None,
        window_shards: int = DEFAULT_WINDOW_SHARDS,
        prefetch: int = 8,
        within_documents: bool = False,
        options: ReadOptions | None = None,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        for name, value in (("seq_length", seq_length), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise DataError(f"{name} is {value}, expected at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(f"data_parallel_rank is {data_parallel_rank}, expected 0 to {data_parallel_size - 1}")
        options = options or ReadOptions()
        self.manifest = dataset if isinstance(dataset, Manifest) else open_dataset(dataset, options)
        self.seq_length, self.micro_batch_size, self.seed = seq_length, micro_batch_size, seed
        self._rank, self._group = data_parallel_rank, micro_batch_size * data_parallel_size
        self._prefetch, self._window_shards = prefetch, window_shards
        num_samples = self.manifest.num_samples(split, seq_length)
        self._num_samples = None if split == "train" else min(num_samples, limit_samples or num_samples)
        self._open_reader = partial(open_reader, self.manifest, split, seq_length, seed, window_shards, options)
        self._reader = self._open_reader()
        self.samples_consumed = samples_consumed
        self.valid_rows = micro_batch_size
        self.document_starts: NDArray[np.int32] | None = None
        self._within_documents = within_documents
        self.wait_s = 0.0
        self._producer: _Producer | None = None
        self._is_closed = False

    @property
    def num_batches(self) -> int | None:
        """Micro-batches that a pass over the validation split gives to each rank; None for train, which has no end."""
        return None if self._num_samples is None else -(-self._num_samples // self._group)

    @property
    def valid_rows_by_batch(self) -> list[int]:
        """`valid_rows` of every micro-batch of a pass over the validation split."""
        assert self._num_samples is not None
        return [self._valid_rows(first) for first in range(0, self._num_samples, self._group)]

    def _valid_rows(self, samples_consumed: int) -> int:
        if self._num_samples is None:
            return self.micro_batch_size
        first_row = samples_consumed + self._rank * self.micro_batch_size
        return min(max(self._num_samples - first_row, 0), self.micro_batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return self

    def __next__(self) -> NDArray[np.int64]:
        if self._is_closed:
            raise ValueError("this stream is closed; open another")
        if self._num_samples is not None and self.samples_consumed >= self._num_samples:
            raise StopIteration
        if self._producer is None:
            positions = _RankPositions(
                self._rank, self.micro_batch_size, self._group, self._num_samples, self.seq_length
            )
            self._producer = _Producer(self._reader, positions, self.samples_consumed, self._prefetch)
            weakref.finalize(self, self._producer.stop)
        started = time.perf_counter()
        batch = self._producer.get()
        self.wait_s += time.perf_counter() - started
        self.valid_rows = self._valid_rows(self.samples_consumed)
        if self._within_documents:
            self.document_starts = document_starts(batch[:, :-1], self.manifest.end_of_document)
        self.samples_consumed += self._group
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, the same on every rank; `load_state_dict` takes it on any other number of ranks."""
        return {
            "samples_consumed": self.samples_consumed,
            "seed": self.seed,
            "fingerprint": self.manifest.fingerprint,
            "seq_length": self.seq_length,
            "window_shards": self._window_shards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises DataError if it belongs to another dataset, seed or sequence length."""
        own = self.state_dict()
        for key in ("fingerprint", "seed", "seq_length", "window_shards"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"the saved position in the data has {key} {state.get(key)!r}, but this run has {own[key]!r}; "
                    "resume with the dataset and settings it was saved with, or start a new run"
                )
        if self._producer is not None:
            self._stop()
            self._reader = self._open_reader()  # a thread that still waits for a network has the other
        self.samples_consumed = int(state["samples_consumed"])

    def close(self) -> None:
        """Stop reading ahead and let go of the files, for good."""
        self._is_closed = True
        self._stop()

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.stop()
            self._producer = None
        self._reader.close()


def open_reader(
    manifest: Manifest, split: str, seq_length: int, seed: int, window_shards: int, options: ReadOptions
) -> SampleReader | MixtureReader:
    """What reads the samples of a split by their position in the run; raises DataError if there is none to read."""
    datasets, is_mixture, shuffle = manifest.datasets, bool(manifest.stages), split == "train"
    readers = []
    for number, dataset in enumerate(datasets):
        samples_per_shard = [shard.num_samples(seq_length) for shard in dataset.shards[split]]
        if not sum(samples_per_shard) and (shuffle or len(datasets) == 1):
            raise DataError(
                f"{dataset.source.describe('')}: the {split} split holds {dataset.num_tokens(split)} tokens, too few "
                f"for one sample of seq_length {seq_length}; prepare more text or shorten the sequence"
            )
        own_seed = f"{seed}/{number}" if is_mixture else seed
        order = SampleOrder(samples_per_shard, own_seed, window_shards, shuffle)
        readers.append(SampleReader(dataset, split, seq_length, order, window_shards, options))
    _require_room_in_cache(sum(reader.cached_bytes for reader in readers), options)
    if not is_mixture:
        return readers[0]
    if shuffle:
        return MixtureReader(MixtureOrder(manifest.stages, seq_length, seed), readers)
    return MixtureReader(ConcatenatedOrder([reader.order.samples_per_epoch for reader in readers]), readers)


def _require_room_in_cache(needed_bytes: int, options: ReadOptions) -> None:
    if needed_bytes > options.cache_gigabytes * 1e9:
        raise DataError(
            f"cache_gigabytes is {options.cache_gigabytes}, but the shards in use or fetched ahead can have "
            f"{needed_bytes / 1e9:.2f} GB; raise it, or lower shuffle_window_shards"
        )


class _RankPositions:
    """Which positions of the run's sequence the micro-batches of one rank hold."""

    def __init__(self, rank: int, micro_batch_size: int, group: int, num_samples: int | None, seq_length: int) -> None:
        self.seq_length = seq_length
        self._offsets = rank * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)
        self._group = group
        self._num_samples = num_samples

    def micro_batches(self, samples_consumed: int, count: int) -> NDArray[np.int64]:
        """Positions [count, micro_batch_size] of the next `count` micro-batches, fewer where the split ends."""
        if self._num_samples is None:
            starts = samples_consumed + self._group * np.arange(count, dtype=np.int64)
            return starts[:, None] + self._offsets
        left = -(-(self._num_samples - samples_consumed) // self._group)
        starts = samples_consumed + self._group * np.arange(min(count, left), dtype=np.int64)
        return np.minimum(starts[:, None] + self._offsets, self._num_samples - 1)


class _Producer:
    """The thread that reads ahead. It never refers to the stream, so an abandoned stream can be collected."""

    def __init__(
        self, reader: SampleReader | MixtureReader, positions: _RankPositions, samples_consumed: int, prefetch: int
    ) -> None:
        self._queue: queue.Queue[NDArray[np.int64] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        arguments = (reader, positions, samples_consumed, self._queue, self._stopped)
        self._thread = threading.Thread(target=_produce, args=arguments, daemon=True, name="token-stream")
        self._thread.start()

    def get(self) -> NDArray[np.int64]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # asking again gives the same answer rather than waiting for ever
            raise item
        return item

    def stop(self) -> None:
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        if self._thread is not threading.current_thread():
            # It may be waiting for a network; it does nothing more once it is through.
            self._thread.join(_LONGEST_STOP_S)


def _produce(
    reader: SampleReader | MixtureReader,
    positions: _RankPositions,
    samples_consumed: int,
    output: queue.Queue[NDArray[np.int64] | BaseException],
    stopped: threading.Event,
) -> None:
    """Read many micro-batches at once, so that the cost of a read is shared, and hand them out one by one.

    The first reads are small, so that the first batch is there soon.
    """
    group, rows = positions._group, len(positions._offsets)
    count, most = 1, max(1, min(_TOKENS_PER_READ // positions.seq_length, _SAMPLES_PER_READ) // rows)
    try:
        while not stopped.is_set():
            wanted = positions.micro_batches(samples_consumed, count)
            if not len(wanted):
                return
            samples = reader.read(wanted.reshape(-1))
            for batch in samples.reshape(len(wanted), rows, -1):
                if not _put(output, batch.astype(np.int64), stopped):
                    return
            samples_consumed += group * len(wanted)
            count = min(2 * count, most)
    except BaseException as error:
        _put(output, error, stopped)


def _put(output: queue.Queue, item: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            output.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
