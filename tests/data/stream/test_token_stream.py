"""Compare streams on any number of ranks, stopped and resumed anywhere, with the samples that one rank reads."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.stream.token_stream import TokenStream
from tests.data.made import SEQ_LENGTH, first_tokens, make_dataset

SIZES = [7, 1, 12, 0, 5, 9, 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", SIZES, validation=[3, 8])


def take(path: Path, count: int, micro_batch_size: int, rank: int = 0, size: int = 1, consumed: int = 0) -> list:
    stream = TokenStream(path, "train", SEQ_LENGTH, micro_batch_size, rank, size, 5, consumed, window_shards=2)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def ids(batches: list) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


def test_samples_are_what_was_written(made: Path) -> None:
    (batch,) = take(made, 1, 37)
    assert batch.dtype == np.int64
    assert np.array_equal(batch, batch[:, :1] + np.arange(SEQ_LENGTH + 1))
    assert set(ids([batch])) == first_tokens(SIZES)


def test_two_ranks_see_what_one_sees_in_the_same_order(made: Path) -> None:
    one = take(made, 30, 4)
    for rank in (0, 1):
        for whole, half in zip(one, take(made, 30, 2, rank, 2), strict=True):
            assert np.array_equal(whole[2 * rank : 2 * rank + 2], half)


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    phases=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_layouts_reads_each_sample_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], phases: list[tuple[int, int, int]]
) -> None:
    """A phase is (ranks, micro-batch size, steps). Some have more ranks than shards or end an epoch in a batch."""
    path = make_dataset(tmp_path_factory.mktemp("data"), sizes)
    seen: list[int] = []
    state = None
    for ranks, micro_batch_size, steps in phases:
        streams = [
            TokenStream(path, "train", SEQ_LENGTH, micro_batch_size, rank, ranks, seed=3, window_shards=2)
            for rank in range(ranks)
        ]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(state)
        for _ in range(steps):
            seen += [int(row[0]) for stream in streams for row in next(stream)]
        states = [stream.state_dict() for stream in streams]
        assert all(each == states[0] for each in states)
        state = json.loads(json.dumps(states[0]))
        for stream in streams:
            stream.close()
    assert state is not None and state["samples_consumed"] == len(seen)
    everything = first_tokens(sizes)
    for start in range(0, len(seen), len(everything)):
        epoch = seen[start : start + len(everything)]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= everything


WORKER = """
import json, sys, time
from data.stream.token_stream import TokenStream
path, rank, ranks, consumed, log = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
stream = TokenStream(path, "train", 4, 1, rank, ranks, seed=5, samples_consumed=consumed, window_shards=2)
with open(log, "a", buffering=1) as file:
    while True:
        position = stream.samples_consumed + rank
        file.write(f"{position} {int(next(stream)[0, 0])}\\n")
        time.sleep(0.001)
"""


def test_killed_processes_resume_on_other_numbers_of_ranks(made: Path, tmp_path: Path) -> None:
    """Run 1, 4, 2, then 3 processes, each time killed at a random moment. Batches that all have finished count."""
    moments = np.random.default_rng(os.getpid())
    committed: list[int] = []
    for phase, ranks in enumerate((1, 4, 2, 3)):
        logs = [tmp_path / f"{phase}-{rank}" for rank in range(ranks)]
        processes = [
            subprocess.Popen([sys.executable, "-c", WORKER, made, *map(str, (rank, ranks, len(committed))), logs[rank]])
            for rank in range(ranks)
        ]
        while not all(log.exists() and log.stat().st_size > 40 for log in logs):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        rows = dict(
            tuple(map(int, line.split()))
            for log in logs
            for line in log.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        )
        while len(committed) in rows:
            committed.append(rows[len(committed)])
        committed = committed[: len(committed) - len(committed) % 2]  # the last checkpoint was taken a little earlier
    assert committed == ids(take(made, len(committed), 1))


def test_a_position_can_be_loaded_into_a_stream_that_is_reading(made: Path) -> None:
    stream = TokenStream(made, "train", SEQ_LENGTH, 3, seed=5, window_shards=2)
    first = [next(stream) for _ in range(6)]
    stream.load_state_dict({**stream.state_dict(), "samples_consumed": 6})
    assert ids([next(stream) for _ in range(4)]) == ids(first[2:])
    stream.close()


def test_resuming_reads_nothing_of_what_was_consumed(made: Path) -> None:
    far = 10**15 + 3
    assert ids(take(made, 2, 3, consumed=far)) == ids(take(made, 1, 6, consumed=far))


def test_validation_is_seen_exactly_once_by_any_number_of_ranks(made: Path) -> None:
    expected = [1_000_000 + i * SEQ_LENGTH for i in range(3)] + [1_000_013 + i * SEQ_LENGTH for i in range(8)]
    for ranks, micro_batch_size in ((1, 4), (2, 2), (3, 5), (4, 1)):
        seen: dict[int, int] = {}
        counts = set()
        for rank in range(ranks):
            stream = TokenStream(made, "validation", SEQ_LENGTH, micro_batch_size, rank, ranks)
            number = 0
            for batch in stream:
                assert batch.shape == (micro_batch_size, SEQ_LENGTH + 1)
                for row in range(stream.valid_rows):
                    seen[(number * ranks + rank) * micro_batch_size + row] = int(batch[row, 0])
                number += 1
            assert number == stream.num_batches
            counts.add(number)
        assert len(counts) == 1
        assert [seen[position] for position in sorted(seen)] == expected


def test_limited_validation_takes_the_first_samples(made: Path) -> None:
    stream = TokenStream(made, "validation", SEQ_LENGTH, 2, limit_samples=3)
    rows = [int(row[0]) for batch in stream for row in batch[: stream.valid_rows]]
    assert rows == [1_000_000, 1_000_004, 1_000_008]


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 6), ("fingerprint", "0" * 64), ("seq_length", 8), ("window_shards", 3)]
)
def test_the_position_of_another_run_is_refused(made: Path, key: str, value: object) -> None:
    stream = TokenStream(made, "train", SEQ_LENGTH, 1, seed=5)
    with pytest.raises(DataError, match=key):
        stream.load_state_dict({**stream.state_dict(), key: value})


def test_one_dataset_serves_every_length(made: Path) -> None:
    for seq_length in (1, 3, 4, 11):
        (batch,) = first_batch(made, seq_length)
        assert np.array_equal(batch, batch[:, :1] + np.arange(seq_length + 1))


def first_batch(made: Path, seq_length: int) -> list:
    stream = TokenStream(made, "train", seq_length, 6)
    rows = [next(stream)]
    stream.close()
    return rows


def test_samples_cross_the_members_of_a_shard(tmp_path: Path) -> None:
    """A member holds 65,536 tokens. Test lengths that divide it, that do not, and one longer than a member."""
    path = make_dataset(tmp_path, [5], seq_length=40_000)
    for seq_length in (32_768, 40_000, 99_999):
        stream = TokenStream(path, "train", seq_length, 2)
        batch = next(stream)
        assert np.array_equal(batch, batch[:, :1] + np.arange(seq_length + 1))
        stream.close()


def test_too_little_text_is_one_clear_line(made: Path) -> None:
    with pytest.raises(DataError, match="too few for one sample of seq_length 4096"):
        TokenStream(made, "train", 4096, 1)


def test_an_error_while_reading_ahead_comes_out_of_next(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, [5])
    (path / "train-000000.tar").unlink()
    stream = TokenStream(path, "train", SEQ_LENGTH, 1)
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be opened"):
            next(stream)


def test_the_time_spent_waiting_is_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TokenStream(made, "train", SEQ_LENGTH, 1)
    read = stream._reader.read

    def slowly(positions: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return read(positions)

    monkeypatch.setattr(stream._reader, "read", slowly)
    next(stream)
    assert 0.15 < stream.wait_s < 60
    stream.close()


def test_closing_does_not_wait_for_a_network(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stream.token_stream._LONGEST_STOP_S", 0.1)
    stream = TokenStream(made, "train", SEQ_LENGTH, 1)
    with hanging_after_the_first_read(stream, monkeypatch):
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < 15


def test_loading_a_position_leaves_a_thread_that_waits_for_a_network_its_own_files(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.stream.token_stream._LONGEST_STOP_S", 0.1)
    stream = TokenStream(made, "train", SEQ_LENGTH, 1, seed=5, window_shards=2)
    with hanging_after_the_first_read(stream, monkeypatch):
        started = time.monotonic()
        stream.load_state_dict({**stream.state_dict(), "samples_consumed": 3})
        rows = ids([next(stream) for _ in range(3)])
        assert time.monotonic() - started < 15
    stream.close()
    assert rows == ids(take(made, 3, 1, consumed=3))


@contextlib.contextmanager
def hanging_after_the_first_read(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take a batch and wait until the thread hangs in its second read. Release it afterwards."""
    read, is_in_read, released = stream._reader.read, [threading.Event(), threading.Event()], threading.Event()

    def hang(positions: np.ndarray) -> np.ndarray:
        if is_in_read[0].is_set():
            is_in_read[1].set()
            released.wait(30)
        is_in_read[0].set()
        return read(positions)

    monkeypatch.setattr(stream._reader, "read", hang)
    next(stream)
    assert is_in_read[1].wait(30)
    try:
        yield
    finally:
        released.set()


def test_a_closed_stream_stops_its_thread_and_refuses_to_go_on(made: Path) -> None:
    stream = TokenStream(made, "train", SEQ_LENGTH, 1)
    next(stream)
    thread = stream._producer._thread  # type: ignore[union-attr]
    stream.close()
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="this stream is closed"):
        next(stream)
