"""What a dataset holds, whether it is whole, and which text a training step saw: `python -m data.inspect`.

    python -m data.inspect DIR                              print what is there
    python -m data.inspect DIR --verify                     check every byte; exit status 2 if something is damaged
    python -m data.inspect DIR --sample 7 --seq-length 128  the 8th sample of a run of that length, decoded
    python -m data.inspect --run RUN --step 300             the samples and documents of a run's 300th step

With --run the dataset, how it is read, sequence length, seed and batch size come from RUN/config.json.
"""

import argparse
import bisect
import contextlib
import functools
import gzip
import io
import json
import zlib
from pathlib import Path

import numpy as np

from data.command_line import run_command, whole_number
from data.errors import DamagedShardError, DataError, printable
from data.fetch.sources import ReadOptions, Source
from data.shards.manifest import SPLITS, Manifest, ShardInfo
from data.shards.text_shard import read_text_sidecar
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from data.stream.samples import open_shard
from data.stream.token_stream import DEFAULT_WINDOW_SHARDS, open_reader

_MAX_DOCUMENT_LIST_BYTES = 256 << 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", nargs="?", help="a dataset: folder, address or mixture file")
    add("--verify", action="store_true", help="check every byte of every shard")
    add(
        "--sample",
        type=whole_number(0),
        metavar="K",
        help="print sample K of the run (from 0), decoded, with its documents",
    )
    add(
        "--step",
        type=whole_number(1, 10**12),
        metavar="N",
        help="print what training step N (from 1) saw; needs the batch size or --run",
    )
    add("--run", type=Path, metavar="RUN", help="a run directory to take the settings below from")
    add("--split", choices=SPLITS, default="train", help="(default train)")
    add("--seq-length", type=whole_number(1), metavar="T", help="tokens of a sample")
    add("--global-batch-size", type=whole_number(1, 1 << 20), metavar="B", help="sequences of a step")
    add("--seed", type=int, default=0, help="training.seed of the run (default 0)")
    window = whole_number(1)
    add("--window-shards", type=window, default=DEFAULT_WINDOW_SHARDS, help="data.shuffle_window_shards (default 8)")
    add("--on-damage", choices=("stop", "skip"), default="stop", help="data.on_damage of the run (default stop)")
    add("--cache-dir", type=Path, metavar="DIR", help="where files from afar are kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.reading = {"on_damage": options.on_damage, "cache_dir": options.cache_dir}
    if options.run is not None:
        _take_from_run(options)
    if options.path is None:
        raise DataError("name a dataset, or a run with --run")
    manifest = open_dataset(options.path, ReadOptions.of(options.reading))
    if options.step is not None:
        _require(options, "seq_length", "global_batch_size")
        first = first_sample_of(options.step, options.global_batch_size, options.run)
        _print_samples(manifest, options, range(first, first + options.global_batch_size), with_text=False)
    elif options.sample is not None:
        _require(options, "seq_length")
        _print_samples(manifest, options, range(options.sample, options.sample + 1), with_text=True)
    else:
        _print_summary(manifest)
        if options.verify:
            _verify(manifest)


def first_sample_of(step: int, global_batch_size: int, run: Path | None) -> int:
    """The first sample that a step (from 1) read, going by the run's journal where the run went back and past some."""
    begun = [(0, 0)]
    journal = None if run is None else run / "journal.jsonl"
    for line in journal.read_text().splitlines() if journal is not None and journal.exists() else ():
        with contextlib.suppress(ValueError):  # a line that a crash cut off
            row = json.loads(line)
            if row.get("event") in ("rolled back", "resumed"):
                begun[1:] = [(at, sample) for at, sample in begun[1:] if at < row["step"]]
            if row.get("event") == "rolled back":
                begun.append((row["step"], row["next_sample"]))
    at, sample = max((at, sample) for at, sample in begun if at < step)
    return sample + (step - 1 - at) * global_batch_size


def documents_of(manifest: Manifest, shard: ShardInfo, first: int, last: int) -> list[str]:
    """Sources of the documents that have tokens in [first, last) of a shard."""
    if manifest.content == "text":
        _, documents = read_text_sidecar(manifest, shard)
        begin, end = np.searchsorted(np.cumsum(documents[:, 2]), (first, last - 1), side="right")
        return [f"the document at byte {offset}" for offset in documents[begin : end + 1, 0]]
    starts, sources = _document_list(manifest.source, shard.name.removesuffix(".tar") + ".documents.jsonl.gz")
    begin = max(bisect.bisect_right(starts, first) - 1, 0)
    return sources[begin : bisect.bisect_left(starts, last)]


@functools.lru_cache(maxsize=64)
def _document_list(source: Source, name: str) -> tuple[list[int], list[str]]:
    """First tokens and sources of a shard's documents; raises DataError if the list is not one that was prepared."""
    where = source.describe(name)
    packed = source.read(name, _MAX_DOCUMENT_LIST_BYTES)
    try:
        lines = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(_MAX_DOCUMENT_LIST_BYTES + 1)
        if len(lines) > _MAX_DOCUMENT_LIST_BYTES:
            raise ValueError(f"more than {_MAX_DOCUMENT_LIST_BYTES} bytes")
        entries = [(int(start), str(origin)) for start, origin in map(json.loads, lines.splitlines())]
        if not entries:
            raise ValueError("it is empty")
    except (ValueError, TypeError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{where}: damaged ({error}); copy or prepare the dataset again") from error
    return [start for start, _ in entries], [printable(origin) for _, origin in entries]


def _take_from_run(options: argparse.Namespace) -> None:
    path = options.run / "config.json"
    try:
        config = json.loads(path.read_bytes())["config"]
        options.path = options.path or config["data"]["path"]
        options.reading = config["data"]
        options.window_shards = config["data"].get("shuffle_window_shards", options.window_shards)
        options.seq_length = config["model"]["seq_length"]
        options.global_batch_size = config["training"]["global_batch_size"]
        options.seed = config["training"]["seed"]
        last_step = config["training"]["train_steps"] or -(
            -config["training"]["train_tokens"] // (options.global_batch_size * options.seq_length)
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); is this a run directory?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: lacks the settings of a run ({error!r})") from error
    if options.step is not None and options.step > last_step:
        raise DataError(f"--step {options.step}: {options.run} ends at step {last_step}; name a step from 1 to that")


def _require(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(options, name), int) or getattr(options, name) < 1:
            raise DataError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, expected a positive number, or --run"
            )


def _print_summary(manifest: Manifest) -> None:
    print(f"fingerprint {manifest.fingerprint}")
    print(f"tokenizer   {manifest.tokenizer_sha256}, {manifest.vocab_size} pieces")
    for dataset in manifest.datasets:
        print(printable(f"{dataset.source.describe('')} ({dataset.content})"))
        for split in SPLITS:
            shards = dataset.shards[split]
            size_gb = sum(shard.num_bytes for shard in shards) / 1e9
            print(f"  {split}: {len(shards)} shards, {dataset.num_tokens(split)} tokens, {size_gb:.3f} GB")
    for stage in manifest.stages:
        print(f"from {stage.from_tokens} tokens on, weights {', '.join(map(str, stage.weights))}")


def _verify(manifest: Manifest) -> None:
    damaged = 0
    shards = [(dataset, shard) for dataset in manifest.datasets for split in SPLITS for shard in dataset.shards[split]]
    for dataset in manifest.datasets:
        _ = dataset.tokenizer_path  # reading it checks it
    for dataset, shard in shards:
        try:
            opened = open_shard(dataset, shard)
            opened.verify_all()
            opened.close()
        except DamagedShardError as error:
            damaged += 1
            print(error)
    if damaged:
        raise DataError(f"{damaged} of {len(shards)} shards are damaged; copy or prepare them again")
    print(f"verified: {len(shards)} shards are as they were prepared")


def _print_samples(manifest: Manifest, options: argparse.Namespace, positions: range, with_text: bool) -> None:
    length, reading = options.seq_length, ReadOptions.of(options.reading)
    reader = open_reader(manifest, options.split, length, options.seed, options.window_shards, reading)
    if options.split == "validation":  # which is read once, so that it has an end
        positions = positions[: max(manifest.num_samples("validation", length) - positions.start, 0)]
        if not positions:
            count = manifest.num_samples("validation", length)
            raise DataError(f"the validation split holds {count} samples of seq_length {length}, counted from 0")
    if with_text or reading.on_damage == "skip":  # reading finds out which shards others take the place of
        tokens = reader.read(np.array(positions))
    for row, position in enumerate(positions):
        dataset, shard, sample = reader.locate(position)
        first = sample * length
        where = printable(f"{dataset.shard_source.describe(shard.name)} tokens {first} to {first + length}")
        print(f"sample {position}: {where}: {', '.join(documents_of(dataset, shard, first, first + length + 1))}")
        if with_text:
            print(printable(Tokenizer(dataset.tokenizer_path).decode(tokens[row]), keep="\n\t"))


if __name__ == "__main__":
    run_command(main)
