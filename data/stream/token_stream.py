"""Yield micro-batches of tokens for one data-parallel rank, in an order that survives restarts and other rank counts.

data/__init__.py tells the whole way of a token. This file is its last step.

Worked example: two ranks, micro_batch_size 2, started at position 8 of the run's sequence of samples
(data/stream/order.py).

    next() number      1        2        3
    rank 0 reads     8  9    12 13    16 17
    rank 1 reads    10 11    14 15    18 19        samples_consumed afterwards: 12, 16, 20

A checkpoint stores `samples_consumed`, which counts the samples of all ranks. Three ranks with micro_batch_size 1 that
resume at 16 read samples 16, 17 and 18 first. So each sample is read exactly once per epoch, whatever the layouts.

All tensor- and pipeline-parallel ranks of one replica pass the same data_parallel_rank, and so see the same
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
    """Iterate over int64 arrays [micro_batch_size, seq_length + 1]: inputs are [:, :-1], labels [:, 1:].

    The split "train" is shuffled and never ends: the last samples of an epoch and the first of the next share a batch.
    The split "validation" is read once, in the manifest's order. Every rank gets `num_batches` micro-batches. Only the
    first `valid_rows` rows of a batch count; the other rows repeat the split's last sample and belong in no average.

    A background thread reads ahead, and `next` raises its errors. Memory is at most `prefetch` micro-batches of int64,
    4 MiB, and 17 bytes for every 16 KiB of the open shards (two windows).

    Args:
        dataset: An address to open, or a manifest.
        split: "train" or "validation".
        seq_length: Inputs per sample, in tokens.
        micro_batch_size: Samples per micro-batch.
        data_parallel_rank: Which replica this is, from 0.
        data_parallel_size: Number of replicas.
        seed: Key of the shuffle.
        samples_consumed: Samples that all ranks have read before.
        limit_samples: Read only this many samples, from the start of the validation split.
        window_shards: How many shards are shuffled together.
        prefetch: How many micro-batches are read ahead.
        within_documents: Whether to set `document_starts` for each batch.
        options: How files are fetched and checked.

    Attributes:
        manifest: The dataset that is read.
        samples_consumed: Samples that all ranks have read, the last batch included.
        valid_rows: How many rows of the last batch count.
        document_starts: Of the last batch, [micro_batch_size, seq_length] (data/stream/document_starts.py); None unless
            `within_documents` is set.
        wait_s: Seconds that `next` has spent waiting so far.

    Raises:
        DataError: An argument is out of range, or the dataset cannot be read.
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
        """Micro-batches per rank in a pass over the validation split; None for train, which never ends."""
        return None if self._num_samples is None else -(-self._num_samples // self._group)

    @property
    def valid_rows_by_batch(self) -> list[int]:
        """`valid_rows` of each micro-batch in a pass over the validation split."""
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
        """Return the position in the data. It is the same on every rank and can be loaded on any number of ranks."""
        return {
            "samples_consumed": self.samples_consumed,
            "seed": self.seed,
            "fingerprint": self.manifest.fingerprint,
            "seq_length": self.seq_length,
            "window_shards": self._window_shards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: The state belongs to another dataset, seed, sequence length or shuffle window.
        """
        own = self.state_dict()
        for key in ("fingerprint", "seed", "seq_length", "window_shards"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"the saved position in the data has {key} {state.get(key)!r}, but this run has {own[key]!r}; "
                    "resume with the dataset and settings it was saved with, or start a new run"
                )
        if self._producer is not None:
            self._stop()
            self._reader = self._open_reader()  # the old one may still belong to a thread that waits for the network
        self.samples_consumed = int(state["samples_consumed"])

    def close(self) -> None:
        """Stop reading ahead and close the files. The stream cannot be used again."""
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
    """Return a reader of a split's samples by their position in the run.

    Raises:
        DataError: The split is too short for one sample, or the cache too small for the shards in use.
    """
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
    """Compute which positions of the run's sequence make up the micro-batches of one rank."""

    def __init__(self, rank: int, micro_batch_size: int, group: int, num_samples: int | None, seq_length: int) -> None:
        self.seq_length = seq_length
        self._offsets = rank * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)
        self._group = group
        self._num_samples = num_samples

    def micro_batches(self, samples_consumed: int, count: int) -> NDArray[np.int64]:
        """Return positions [count, micro_batch_size] of the next `count` micro-batches; fewer where the split ends."""
        if self._num_samples is None:
            starts = samples_consumed + self._group * np.arange(count, dtype=np.int64)
            return starts[:, None] + self._offsets
        left = -(-(self._num_samples - samples_consumed) // self._group)
        starts = samples_consumed + self._group * np.arange(min(count, left), dtype=np.int64)
        return np.minimum(starts[:, None] + self._offsets, self._num_samples - 1)


class _Producer:
    """A thread that reads ahead. It holds no reference to the stream, so an abandoned stream can be collected."""

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
            self._queue.put(item)  # so that the next call raises again instead of waiting forever
            raise item
        return item

    def stop(self) -> None:
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        if self._thread is not threading.current_thread():
            # It may be waiting for the network. It ends by itself after that.
            self._thread.join(_LONGEST_STOP_S)


def _produce(
    reader: SampleReader | MixtureReader,
    positions: _RankPositions,
    samples_consumed: int,
    output: queue.Queue[NDArray[np.int64] | BaseException],
    stopped: threading.Event,
) -> None:
    """Read many micro-batches at once to share the cost of a read, and put them into the queue one by one.

    The first reads are small, so that the first batch arrives soon.
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
