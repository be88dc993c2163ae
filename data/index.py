"""Make a dataset from existing webdataset shards of text, without copying them: `python -m data.index`.

    python -m data.index --address /data/shards --train 'a-*.tar' --tokenizer FILE --output DIR
    python -m data.index --address https://host/shards --train a-{000..019}.tar --validation a-020.tar ...

The shards are uncompressed tars with .txt members, or .json members that hold a string under --text-key. Other members
are left out, and counted. If a sample has a .txt and a .json, --text-member says which is the text.

Each shard is read once, to record where its documents lie and how many tokens each makes. Training then tokenizes on
the fly, with the same order and the same checks as for shards of tokens. Another tokenizer needs another index.
"""

import argparse
import glob
import itertools
import math
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from data.command_line import add_workers, end_with_parent, path_argument, run_command
from data.errors import DataError
from data.fetch.sources import MANIFEST_NAME, ReadOptions, open_source
from data.files.address import is_remote
from data.files.own import write_atomically
from data.shards.manifest import MAX_SHARDS, SPLITS, TOKENIZER, ShardInfo, is_shard_name, load_manifest, manifest_json
from data.shards.tar_layout import token_dtype_for
from data.shards.text_index import TEXT_SUFFIXES, IndexJob, counted, index_shard
from data.shards.tokenizer import Tokenizer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--address", required=True, help="where the shards are: a folder, http(s)://, s3:// or 'pipe:COMMAND {}'")
    add(
        "--train",
        nargs="+",
        default=[],
        metavar="NAME",
        help="shards to train on; {000..019} is a range, and globs work if --address is a folder",
    )
    add("--validation", nargs="+", default=[], metavar="NAME", help="shards to validate on, named likewise")
    add("--tokenizer", type=path_argument, required=True, metavar="FILE", help="the tokenizer.model to use")
    add(
        "--output",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="folder of the dataset; created if missing, may be the shards' own",
    )
    add("--text-key", default="text", metavar="KEY", help='key of the text in .json members (default "text")')
    add(
        "--text-member",
        metavar="EXTENSION",
        help="the member of each sample that is its text: txt, json or, say, caption.txt (default: all .txt and .json)",
    )
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Index the shards and write the manifest; raise DataError for a fault in the shards or the options."""
    options = parse_arguments(arguments)
    tokenizer = Tokenizer(options.tokenizer)
    names = {split: _expand(options.address, getattr(options, split)) for split in SPLITS}
    _check(options, names["train"] + names["validation"])
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        IndexJob(options.address, name, options.output, options.tokenizer, options.text_key, options.text_member)
        for split in SPLITS
        for name in names[split]
    ]
    indexed = _index_all(jobs, options.workers)
    infos = [info for info, _ in indexed]
    left_out = sum((others for _, others in indexed), Counter())
    by_split = {"train": infos[: len(names["train"])], "validation": infos[len(names["train"]) :]}
    model = options.tokenizer.read_bytes()
    if not _holds(options.output / TOKENIZER, model):
        write_atomically(options.output / TOKENIZER, model)
    dtype = token_dtype_for(tokenizer.vocab_size)
    text = manifest_json(
        "text", tokenizer.end_of_document, tokenizer.vocab_size, model, dtype, by_split, options.text_key
    )
    write_atomically(options.output / MANIFEST_NAME, text)
    manifest = load_manifest(options.output)
    for split in SPLITS:
        print(f"{options.output}: {split}: {len(manifest.shards[split])} shards, {manifest.num_tokens(split)} tokens")
    if left_out:
        print(f"left out: members that are not the text: {counted(left_out)}")
    if is_remote(options.address):
        print(
            f'to read it, set data.path to a mixture file: {{"datasets": [{{"path": "{options.output.resolve()}", '
            f'"shards": "{options.address}"}}]}}'
        )


def _check(options: argparse.Namespace, names: list[str]) -> None:
    """Raise DataError for a fault before anything is written. The output may be the folder of the shards."""
    open_source(options.address, ReadOptions(allow_commands=True))  # raises DataError for one that cannot be read
    if not names:
        raise DataError(f"--address {options.address}: names no shard; see --train and --validation")
    if len(names) > MAX_SHARDS:
        raise DataError(f"--address {options.address}: {len(names)} shards, a dataset has at most {MAX_SHARDS}")
    for name in names:
        if not is_shard_name(name):
            raise DataError(
                f"{name!r} is not a plain file name ending in .tar, of letters, digits, '.', '_' and '-' alone; "
                "rename or unpack the file, and name its folder with --address"
            )
    twice = next((name for name, other in itertools.pairwise(sorted(names)) if name == other), None)
    if twice is not None:
        raise DataError(f"{twice} is named twice by --train and --validation; name each shard once")
    if options.text_member is not None and f".{options.text_member.rpartition('.')[2]}" not in TEXT_SUFFIXES:
        raise DataError(f"--text-member {options.text_member}: expected an extension that ends in txt or json")
    if options.output.exists() and not options.output.is_dir():
        raise DataError(f"--output {options.output}: is a file; name a folder")
    if (options.output / MANIFEST_NAME).exists():
        raise DataError(f"--output {options.output}: holds a dataset; name another folder")
    there = options.output / TOKENIZER
    if there.exists() and not _holds(there, options.tokenizer.read_bytes()):
        raise DataError(
            f"{there}: is a different tokenizer from {options.tokenizer}; name another folder with --output"
        )


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _index_all(jobs: list[IndexJob], workers: int) -> list[tuple[ShardInfo, Counter[str]]]:
    with ProcessPoolExecutor(min(workers, len(jobs)), None, end_with_parent, (os.getpid(),)) as pool:
        try:
            return list(tqdm(pool.map(index_shard, jobs), total=len(jobs), desc="index", unit="shard"))
        except BrokenProcessPool as error:
            raise DataError("a worker was killed, perhaps for memory; run again with fewer --workers") from error


def _expand(address: str, patterns: list[str]) -> list[str]:
    """Return the names of the shards, in order; raise DataError for a pattern that matches nothing."""
    names: list[str] = []
    for pattern in patterns:
        for name in _ranges(pattern):
            found = [name] if is_remote(address) else sorted(glob.glob(name, root_dir=address))
            if not found:
                raise DataError(f"{address}/{name}: no such shard; check --address and the names")
            names += found
    return names


def _ranges(pattern: str) -> list[str]:
    """Expand ranges: a-{08..10}.tar gives a-08.tar, a-09.tar, a-10.tar. Raise DataError for none or too many."""
    first, *pieces = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    lows, highs, between = pieces[::3], pieces[1::3], pieces[2::3]
    count = math.prod(max(int(high) - int(low) + 1, 0) for low, high in zip(lows, highs, strict=True))
    if not 0 < count <= MAX_SHARDS:
        raise DataError(f"{pattern}: names {count} shards, expected 1 to {MAX_SHARDS}; correct the range")
    choices = [
        [f"{number:0{len(low)}d}{text}" for number in range(int(low), int(high) + 1)]
        for low, high, text in zip(lows, highs, between, strict=True)
    ]
    return [first + "".join(chosen) for chosen in itertools.product(*choices)]


if __name__ == "__main__":
    run_command(main)
