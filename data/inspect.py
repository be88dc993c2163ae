"""Show what a dataset holds, verify it, or trace a training step to its text: `python -m data.inspect`.

    python -m data.inspect DIR                              print tokenizer, splits and sizes
    python -m data.inspect DIR --verify                     check every byte; exit status 2 if a shard is damaged
    python -m data.inspect DIR --sample 7 --seq-length 128  print the 8th sample of a run of that length, decoded
    python -m data.inspect --run RUN --step 300             print the samples and documents of a run's 300th step

--run takes the dataset, the data settings, sequence length, seed and batch size from RUN/config.json.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.command_line import add_allow_commands, path_argument, run_command, whole_number
from data.errors import DamagedShardError, DataError, printable
from data.fetch.sources import ReadOptions
from data.files.address import is_command
from data.files.own import open_to_read
from data.files.strict_json import check_shape, parse_json, read_json
from data.shards.document_list import documents_of
from data.shards.manifest import SPLITS, Manifest
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from data.stream.samples import open_shard
from data.stream.token_stream import DEFAULT_WINDOW_SHARDS, open_reader


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", nargs="?", help="the dataset: a folder, an address or a mixture file")
    add("--verify", action="store_true", help="check every byte of every shard")
    add(
        "--sample",
        type=whole_number(0),
        metavar="K",
        help="print sample K of the run (from 0), decoded, and its documents",
    )
    add(
        "--step",
        type=whole_number(1, 10**12),
        metavar="N",
        help="print the samples of training step N (from 1); needs --run, or --seq-length and --global-batch-size",
    )
    add("--run", type=path_argument, metavar="RUN", help="run directory that gives the settings below")
    add("--split", choices=SPLITS, default="train", help="split to read samples from (default train)")
    add("--seq-length", type=whole_number(1), metavar="T", help="tokens per sample")
    add("--global-batch-size", type=whole_number(1, 1 << 20), metavar="B", help="sequences per step")
    add("--seed", type=int, default=0, help="training.seed of the run (default 0)")
    window = whole_number(1)
    add("--window-shards", type=window, default=DEFAULT_WINDOW_SHARDS, help="data.shuffle_window_shards (default 8)")
    add("--on-damage", choices=("stop", "skip"), default="stop", help="data.on_damage of the run (default stop)")
    add("--cache-dir", type=path_argument, metavar="DIR", help="where fetched files are stored")
    add_allow_commands(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print what was asked for; raise DataError for a fault in the dataset, the run or the options."""
    options = parse_arguments(arguments)
    options.reading = {"on_damage": options.on_damage, "cache_dir": options.cache_dir}
    allow_commands = options.allow_commands or is_command(options.path or "")
    if options.run is not None:
        _take_from_run(options)
    options.reading["allow_commands"] = allow_commands
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


WHERE: dict[str, Any] = {"resumed": {"step": int}, "rolled back": {"step": int, "next_sample": int}}
"""Events of a journal that say where a run went on, and what they hold."""
SETTINGS = {
    "config": {
        "data": {"path": str},
        "model": {"seq_length": int},
        "training": {"global_batch_size": int, "seed": int},
    }
}
"""What config.json of a run must hold."""


def first_sample_of(step: int, global_batch_size: int, run: Path | None) -> int:
    """Return the first sample that a step read.

    Args:
        step: The step, from 1.
        global_batch_size: Sequences per step.
        run: The run's folder. Its journal tells where the run was rolled back and skipped samples. None if unknown.
    """
    begun = [(0, 0)]
    journal = None if run is None else run / "journal.jsonl"
    for row in _events(journal) if journal is not None and journal.exists() else ():
        if row["event"] in ("rolled back", "resumed"):
            begun[1:] = [(at, sample) for at, sample in begun[1:] if at < row["step"]]
        if row["event"] == "rolled back":
            begun.append((row["step"], row["next_sample"]))
    at, sample = max((at, sample) for at, sample in begun if at < step)
    return sample + (step - 1 - at) * global_batch_size


def _events(journal: Path) -> Iterator[dict[str, Any]]:
    """Yield the events that say where a run went on; lines that a crash cut short are left out."""
    with open_to_read(journal) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                check_shape(row, {"event": str})
                if row["event"] in WHERE:
                    check_shape(row, WHERE[row["event"]])
                    yield row


def _take_from_run(options: argparse.Namespace) -> None:
    path = options.run / "config.json"
    try:
        described = read_json(path)
        check_shape(described, SETTINGS)
        config = described["config"]
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
        raise DataError(f"{path}: lacks the settings of a run ({error})") from error
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
        _ = dataset.tokenizer_path  # fetched and checked by the property
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
    if options.split == "validation":  # read once, so it has an end
        positions = positions[: max(manifest.num_samples("validation", length) - positions.start, 0)]
        if not positions:
            count = manifest.num_samples("validation", length)
            raise DataError(f"the validation split holds {count} samples of seq_length {length}, counted from 0")
    if with_text or reading.on_damage == "skip":  # `locate` knows replaced shards only after reading
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
