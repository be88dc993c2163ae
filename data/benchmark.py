"""Compare loaders on the same random tokens: `python -m data.benchmark --tokens 100e6`.

Each loader runs in one process and delivers int64 batches of shuffled sequences, as a training rank reads them. Loaders
that are not installed are left out:

    this project         shards of this project, checked and resumable
    memmap               a memory-mapped array read at random: an upper bound, without checks
    webdataset           its shuffle buffer, over tars with one sequence per member and over our shards
    litdata              its streaming loader
    mosaicml-streaming   its streaming dataset

The column "first batch" is the time from opening the dataset to its first batch, in seconds. The column "resume" is the
time until a run that has consumed half an epoch gets its next batch; a dash means that the loader cannot resume.
"""

import argparse
import importlib
import io
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.command_line import real_number, run_command, whole_number
from data.shards.manifest import manifest_json
from data.shards.writer import write_shard
from data.stream.token_stream import TokenStream

Opened = Iterator[NDArray[np.int64]]
SHARD_TOKENS = 16 << 20


class Setting(NamedTuple):
    """What every loader is given. Each writes its files to a folder of its own under `folder`."""

    folder: Path
    tokens: NDArray[np.uint16]
    seq_length: int
    batch_size: int


class Loader(NamedTuple):
    """How to write a dataset, and how to open it after a number of consumed samples (0 if it cannot resume)."""

    name: str
    module: str
    write: Callable[[Setting], None]
    open: Callable[[Setting, int], Opened]
    resumes: bool


def main(arguments: list[str] | None = None) -> None:
    """Measure each installed loader and print a line for it."""
    parser = argparse.ArgumentParser(
        prog="python -m data.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=real_number(1e4, 1e10), default=100e6, help="size of the dataset in tokens (default 100e6)"
    )
    parser.add_argument("--seq-length", type=whole_number(1), default=2048, help="tokens per sequence (default 2048)")
    parser.add_argument("--batch-size", type=whole_number(1), default=16, help="sequences per batch (default 16)")
    parser.add_argument(
        "--seconds", type=real_number(0), default=5, help="how long to read from each loader (default 5)"
    )
    parser.add_argument(
        "--shards",
        type=whole_number(1),
        help="measure only the time to the first batch of this many small shards of this project",
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as folder:
        if options.shards is not None:
            print(f"first batch of {options.shards} shards: {_many_shards(Path(folder), options.shards):.3f} s")
            return
        tokens = np.random.default_rng(0).integers(2, 32_000, int(options.tokens), dtype=np.uint16)
        setting = Setting(Path(folder), tokens, options.seq_length, options.batch_size)
        print(f"{'loader':34s} {'Mtok/s':>8s} {'first batch s':>14s} {'resume s':>9s}")
        for loader in LOADERS:
            if not _is_usable(loader.module):
                continue
            loader.write(setting)
            print(f"{loader.name:34s} {_measure(loader, setting, options.seconds)}", flush=True)


def _is_usable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception as error:  # an import can fail in any way; the other loaders are still compared
        print(f"{module}: left out, cannot be imported ({type(error).__name__}: {error})")
        return False
    return True


def _measure(loader: Loader, setting: Setting, seconds: float) -> str:
    begin = time.perf_counter()
    batches = loader.open(setting, 0)
    next(batches)
    first_s = time.perf_counter() - begin
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        assert next(batches).shape[0] == setting.batch_size
        count += 1
    rate = count * setting.batch_size * setting.seq_length / (time.perf_counter() - begin) / 1e6
    del batches
    if not loader.resumes:
        return f"{rate:8.1f} {first_s:14.3f} {'-':>9s}"
    half = len(setting.tokens) // setting.seq_length // 2
    begin = time.perf_counter()
    next(loader.open(setting, half - half % setting.batch_size))
    return f"{rate:8.1f} {first_s:14.3f} {time.perf_counter() - begin:9.3f}"


def _sequences(setting: Setting) -> Iterator[NDArray[np.uint16]]:
    """Yield consecutive sequences that overlap by one token, so that each has seq_length inputs and labels."""
    for start in range(0, len(setting.tokens) - setting.seq_length, setting.seq_length):
        yield setting.tokens[start : start + setting.seq_length + 1]


def _batched(rows: Iterator[NDArray], batch_size: int) -> Opened:
    while True:
        yield np.stack(list(itertools.islice(rows, batch_size))).astype(np.int64)


def _write_ours(setting: Setting) -> None:
    folder = setting.folder / "ours"
    folder.mkdir()
    shards = [
        write_shard(folder / f"train-{number:06d}.tar", setting.tokens[start : start + SHARD_TOKENS], "uint16")
        for number, start in enumerate(range(0, len(setting.tokens), SHARD_TOKENS))
    ]
    (folder / "tokenizer.model").write_bytes(b"none")
    by_split = {"train": shards, "validation": []}
    (folder / "manifest.json").write_text(manifest_json("tokens", 1, 32_000, b"none", "uint16", by_split))


def _open_ours(setting: Setting, consumed: int) -> Opened:
    return TokenStream(
        setting.folder / "ours", "train", setting.seq_length, setting.batch_size, samples_consumed=consumed
    )


def _many_shards(folder: Path, count: int) -> float:
    """Return the seconds from opening a dataset of `count` shards of 4,096 tokens to its first batch."""
    tokens = np.arange(4096, dtype=np.uint16)
    shards = [write_shard(folder / f"train-{number:06d}.tar", tokens, "uint16") for number in range(count)]
    (folder / "tokenizer.model").write_bytes(b"none")
    by_split = {"train": shards, "validation": []}
    (folder / "manifest.json").write_text(manifest_json("tokens", 1, 32_000, b"none", "uint16", by_split))
    begin = time.perf_counter()
    next(TokenStream(folder, "train", 128, 16))
    return time.perf_counter() - begin


def _write_memmap(setting: Setting) -> None:
    setting.tokens.tofile(setting.folder / "tokens.bin")


def _open_memmap(setting: Setting, consumed: int) -> Opened:
    tokens = np.memmap(setting.folder / "tokens.bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(consumed)
    while True:
        starts = order.integers(0, len(tokens) - setting.seq_length - 1, setting.batch_size)
        yield np.stack([tokens[start : start + setting.seq_length + 1] for start in starts]).astype(np.int64)


def _write_webdataset(setting: Setting) -> None:
    folder = setting.folder / "webdataset"
    folder.mkdir()
    per_shard = max(1, SHARD_TOKENS // setting.seq_length)
    rows = _sequences(setting)
    for number in itertools.count():
        shard = list(itertools.islice(rows, per_shard))
        if not shard:
            return
        with tarfile.open(folder / f"{number:06d}.tar", "w") as archive:
            for place, row in enumerate(shard):
                member = tarfile.TarInfo(f"{number:06d}{place:06d}.tokens")
                member.size = row.nbytes
                archive.addfile(member, io.BytesIO(row.tobytes()))


def _open_webdataset(setting: Setting, _: int) -> Opened:
    import webdataset

    urls = [str(path) for path in sorted((setting.folder / "webdataset").glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(1000)
    return _batched((np.frombuffer(sample["tokens"], np.uint16) for sample in samples), setting.batch_size)


def _open_webdataset_blocks(setting: Setting, _: int) -> Opened:
    import webdataset

    urls = [str(path) for path in sorted((setting.folder / "ours").glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(16)

    def rows() -> Iterator[NDArray]:
        for sample in samples:
            block = np.frombuffer(sample["tokens"], np.uint16)
            for start in range(0, len(block) - setting.seq_length, setting.seq_length):
                yield block[start : start + setting.seq_length + 1]

    return _batched(rows(), setting.batch_size)


def _write_litdata(setting: Setting) -> None:
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    block = setting.seq_length + 1
    folder = setting.folder / "litdata"
    loader = TokensLoader(block_size=block)
    import torch

    chunk = SHARD_TOKENS // block * block
    writer = BinaryWriter(str(folder), item_loader=loader, chunk_size=chunk)
    for number, start in enumerate(range(0, len(setting.tokens), chunk // 16)):
        writer[number] = torch.from_numpy(setting.tokens[start : start + chunk // 16].astype(np.int32))
    writer.done()
    writer.merge(num_workers=1)


def _open_litdata(setting: Setting, consumed: int) -> Opened:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    item_loader = TokensLoader(setting.seq_length + 1)
    dataset = StreamingDataset(str(setting.folder / "litdata"), item_loader=item_loader, shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=setting.batch_size, num_workers=0)
    if consumed:
        state = loader.state_dict()
        state |= {"num_samples_yielded": consumed, "current_epoch": 1}
        state["dataset"] |= {"num_samples_yielded": consumed, "sample_in_epoch": consumed}
        loader.load_state_dict(state)
    while True:
        for batch in loader:
            yield np.asarray(batch, dtype=np.int64)


def _write_mosaic(setting: Setting) -> None:
    from streaming import MDSWriter

    with MDSWriter(
        out=str(setting.folder / "mds"), columns={"tokens": "ndarray:uint16"}, size_limit=32 << 20
    ) as writer:
        for row in _sequences(setting):
            writer.write({"tokens": row})


def _open_mosaic(setting: Setting, consumed: int) -> Opened:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=str(setting.folder / "mds"), shuffle=True, shuffle_seed=0, batch_size=setting.batch_size
    )
    if consumed:
        dataset.load_state_dict(dataset.state_dict(consumed, from_beginning=True))
    rows = (sample["tokens"] for _ in itertools.count() for sample in dataset)
    return _batched(rows, setting.batch_size)


def _nothing(_: Setting) -> None:
    """Write nothing: the dataset exists already."""


LOADERS = (
    Loader("this project", "data", _write_ours, _open_ours, resumes=True),
    Loader("memmap, unchecked", "numpy", _write_memmap, _open_memmap, resumes=True),
    Loader("webdataset, 1 sequence/member", "webdataset", _write_webdataset, _open_webdataset, resumes=False),
    Loader("webdataset, 64 Ki tokens/member", "webdataset", _nothing, _open_webdataset_blocks, resumes=False),
    Loader("litdata", "litdata", _write_litdata, _open_litdata, resumes=True),
    Loader("mosaicml-streaming", "streaming", _write_mosaic, _open_mosaic, resumes=True),
)

if __name__ == "__main__":
    run_command(main)
