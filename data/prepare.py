"""Turn text into a dataset of token shards: `python -m data.prepare --input PATHS --output DIR --vocab-size N`.

After an interruption, run the same command again: it continues where it stopped. To use many machines, run the stages
one after the other and divide each among tasks (slurm/prepare.sh): --stage scan --task 3/16.

Memory does not grow with the size of the input. With the default sizes:

    learning the vocabulary   0.45 GiB; more with --tokenizer-megabytes
    encoding and packing      up to 0.2 GiB per worker; more with --shard-megabytes
    a large document          13 bytes per byte of it, in one worker; a document may have 64 MiB
    a .zst of a long window   the window, up to 2 GiB (zstd --long=31), in each worker that reads one
    marking duplicates        50 bytes per document, for 16 million documents at a time, in the first process
    dividing the work         0.4 kB per input file, in the first process
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from data.command_line import (
    add_workers,
    end_with_parent,
    path_argument,
    print_warning,
    real_number,
    run_command,
    whole_number,
)
from data.errors import DataError
from data.fetch.sources import MANIFEST_NAME
from data.files.own import open_to_append, write_atomically
from data.files.strict_json import read_json
from data.shards.manifest import REPORT, SPLITS, TOKENIZER
from data.shards.tokenizer import Tokenizer
from data.text.account import LOST, Account
from data.text.input_files import DEFAULT_INCLUDE, Slice, find_files, plan_parts
from data.text.preparation import OWN_NAME, PLAN, STAGES, UNITS, WORK, Preparation, Settings, run_job

_USUAL_SEQ_LENGTH = 2048
"""Tokens that a validation split should hold more than: the sequences of the largest shipped configuration."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or globs; .txt, .py and .jsonl are found in folders, also as .gz and .zst",
    )
    add("--output", type=path_argument, required=True, metavar="DIR", help="folder of the dataset; created if missing")
    add("--vocab-size", type=whole_number(259, 1 << 24), metavar="N", help="learn a vocabulary of this many tokens")
    add("--tokenizer", type=path_argument, metavar="FILE", help="use this SentencePiece model instead of learning one")
    add(
        "--include",
        nargs="+",
        default=list(DEFAULT_INCLUDE),
        metavar="GLOB",
        help="names of the files to take from folders (default: .txt, .py and .jsonl, plain or compressed)",
    )
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out paths of which a component matches")
    add(
        "--max-megabytes",
        type=real_number(1e-6),
        metavar="MB",
        help="use at most this much text, from a fixed arbitrary choice of files",
    )
    add(
        "--validation-fraction",
        type=real_number(0, 0.999),
        metavar="F",
        help="fraction of documents held out (default 0.01)",
    )
    add(
        "--hold-out",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="hold out instead all files with a matching path component: whole projects or books, say 'django-*'",
    )
    add(
        "--tokenizer-megabytes",
        type=real_number(1e-6),
        default=32,
        metavar="MB",
        help="amount of text to learn the vocabulary from (default 32)",
    )
    shard_megabytes = real_number(0.01, 16_000)
    add(
        "--shard-megabytes", type=shard_megabytes, default=64, metavar="MB", help="largest size of a shard (default 64)"
    )
    add("--text-key", default="text", metavar="KEY", help='key of the text in .jsonl lines (default "text")')
    add(
        "--skip-bad-text",
        action="store_true",
        help="skip and count lines, pieces and files that are damaged, not UTF-8 or not text, instead of stopping",
    )
    add("--strict", action="store_true", help="stop before reading if a file named would not be read, and say why")
    add_workers(parser)
    add("--stage", choices=("all", *STAGES), default="all", help="run one stage only (default all)")
    add("--task", default="0/1", metavar="I/N", help="with --stage: run only the jobs of task I of N (default 0/1)")
    add("--overwrite", action="store_true", help="discard the dataset or unfinished work in DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare a dataset; raise DataError for a fault in the input, the options or the output folder."""
    options = parse_arguments(arguments)
    _check(options)
    started = time.monotonic()
    if options.overwrite and options.output.is_dir():
        _discard(options.output)
    settings = _settings(options)
    account = Account()
    parts = plan_parts(
        find_files(options.input, options.include, options.exclude, options.output, account),
        None if options.max_megabytes is None else int(options.max_megabytes * 1e6),
        account,
    )
    if options.strict:
        _check_all_are_read(account)
    _check_hold_out(settings, parts)
    plan_sha256 = _plan_sha256(settings, parts)
    part_bytes = tuple(sum(piece.text_bytes for piece in part) for part in parts)
    preparation = Preparation(options.output, settings, part_bytes)
    if _is_prepared(preparation, plan_sha256):
        shutil.rmtree(preparation.work, ignore_errors=True)  # left if the process was killed after the last write
        print(f"{options.output}: already prepared from this input with these settings")
        return
    with _locked(preparation, exclusive=options.stage == "all"):
        _adopt_plan(preparation, plan_sha256)
        preparation.write_parts(parts, account)
        del parts  # it lists every input file, and workers need the memory
        if options.tokenizer is not None:
            write_atomically(options.output / TOKENIZER, options.tokenizer.read_bytes())
        for stage in STAGES if options.stage == "all" else (options.stage,):
            _run_stage(preparation, stage, *_task(options.task), options.workers)
    if (options.output / REPORT).exists():
        what = "" if options.stage == "all" else f" in stage {options.stage}"
        _print_report(options.output, f"{time.monotonic() - started:.1f} s{what}")


def _check(options: argparse.Namespace) -> None:
    if (options.vocab_size is None) == (options.tokenizer is None):
        raise DataError("give either --vocab-size N, to learn a vocabulary, or --tokenizer FILE, to use one")
    if options.output.exists() and not options.output.is_dir():
        raise DataError(f"--output {options.output}: is a file; name a folder")
    if options.output.is_dir() and any(options.output.iterdir()) and not _is_ours(options.output):
        raise DataError(f"--output {options.output}: holds other files; name an empty or new folder")
    if options.strict and options.skip_bad_text:
        raise DataError("give either --skip-bad-text, which skips what cannot be read, or --strict, which refuses it")
    if options.hold_out and options.validation_fraction is not None:
        raise DataError("give either --hold-out, which names what is held out, or --validation-fraction")
    _task(options.task)


def _validation_fraction(options: argparse.Namespace) -> float:
    if options.validation_fraction is not None:
        return float(options.validation_fraction)
    return 0.0 if options.hold_out else 0.01


def _check_all_are_read(account: Account) -> None:
    """Raise DataError if files named would not be read, unless the options ask to leave them out."""
    if account.total(*LOST).files:
        why = ", ".join(
            f"{reason}: {count.files} ({count.examples[0]})"
            for (outcome, reason), count in account.counts.items()
            if outcome in LOST
        )
        raise DataError(f"--strict: not all files would be read: {why}. Name them with --include or --exclude")


def _check_hold_out(settings: Settings, parts: list[list[Slice]]) -> None:
    """Refuse patterns that hold out no file or all files."""
    held_out = {settings.holds_out(path) for path in {piece.path for part in parts for piece in part}}
    if settings.hold_out and held_out != {True, False}:
        found = "all" if held_out == {True} else "none"
        raise DataError(
            f"--hold-out {' '.join(settings.hold_out)}: {found} of the input files match; name folders or files of "
            "which some are the input's"
        )


def _is_ours(folder: Path) -> bool:
    """Return whether a preparation has begun in the folder."""
    try:
        return re.fullmatch(r"[0-9a-f]{64}\s*", (folder / PLAN).read_text()) is not None
    except (OSError, ValueError):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        unfinished = re.compile(rf"\.{re.escape(PLAN)}\.[0-9a-f]{{8}}\.tmp")  # of a kill while the note was written
        return {name for name in found if not unfinished.fullmatch(name)} <= {WORK, f"{WORK}/lock"}


def _task(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"--task {text}: expected I/N with I from 0 to N-1, such as 0/4")
    return int(index), int(count)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        vocab_size=options.vocab_size,
        tokenizer_sha256=None if options.tokenizer is None else Tokenizer(options.tokenizer).sha256,
        tokenizer_megabytes=options.tokenizer_megabytes,
        validation_fraction=_validation_fraction(options),
        hold_out=options.hold_out,
        shard_megabytes=options.shard_megabytes,
        text_key=options.text_key,
        skip_bad_text=options.skip_bad_text,
    )


def _plan_sha256(settings: Settings, parts: list[list[Slice]]) -> str:
    """Return a hash of settings and input. Two preparations with the same hash give the same dataset."""
    files = sorted({piece.path for part in parts for piece in part})
    modified_ns = [os.stat(file).st_mtime_ns for file in files]
    plan = {"settings": dataclasses.asdict(settings), "parts": parts, "modified_ns": modified_ns}
    digest = hashlib.sha256()
    for text in json.JSONEncoder().iterencode(plan):  # piece by piece, since the whole may be large
        digest.update(text.encode())
    return digest.hexdigest()


def _is_prepared(preparation: Preparation, plan_sha256: str) -> bool:
    """Return whether the folder holds the finished dataset of this plan; raise DataError if it holds another."""
    if not (preparation.output / MANIFEST_NAME).exists():
        return False
    note = preparation.output / PLAN
    if note.exists() and note.read_text().strip() == plan_sha256:
        return True
    raise DataError(
        f"--output {preparation.output}: holds a dataset made from other input or settings; name another folder, or "
        "replace it with --overwrite"
    )


def _adopt_plan(preparation: Preparation, plan_sha256: str) -> None:
    note = preparation.output / PLAN
    if note.exists() and note.read_text().strip() != plan_sha256:
        raise DataError(
            f"--output {preparation.output}: holds unfinished work on other input or settings; finish it, or discard "
            "it with --overwrite"
        )
    write_atomically(note, f"{plan_sha256}\n".encode())


def _discard(folder: Path) -> None:
    """Delete what a preparation has written, and nothing else; what says that the folder is ours goes last."""
    for path in list(folder.iterdir()):
        if OWN_NAME.fullmatch(path.name) and path.name != PLAN:
            path.unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(preparation: Preparation, exclusive: bool) -> Iterator[None]:
    """Lock the folder. Tasks of one stage may share it; a whole preparation needs it alone."""
    preparation.work.mkdir(parents=True, exist_ok=True)
    with open_to_append(preparation.work / "lock") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"--output {preparation.output}: another process is preparing it; wait until it has finished"
            ) from error
        yield


def _run_stage(preparation: Preparation, stage: str, task: int, num_tasks: int, workers: int) -> None:
    jobs = range(task, preparation.num_jobs(stage), num_tasks)
    pending = [job for job in jobs if not preparation.result(stage, job).exists()]
    unit = UNITS[stage]
    weights = {job: preparation.weight(stage, job) for job in pending}
    with tqdm(
        total=sum(weights.values()),
        desc=f"{stage:6s}",
        unit=unit,
        unit_scale=unit == "B",
        mininterval=_progress_interval_s(),
    ) as bar:
        if len(pending) < 2 or workers == 1:
            for job in pending:
                run_job(preparation, stage, job)
                bar.update(weights[job])
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(pending)), context, end_with_parent, (os.getpid(),)) as pool:
            futures = {pool.submit(run_job, preparation, stage, job): job for job in pending}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(weights[futures[future]])
            except BrokenProcessPool as error:
                raise DataError("a worker was killed, perhaps for memory; run again with fewer --workers") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _progress_interval_s() -> float:
    return 0.2 if sys.stderr.isatty() else 10.0


def _print_report(folder: Path, time_spent: str) -> None:
    report = read_json(folder / REPORT)
    for line in Account.from_json(report["inputs"]).lines():
        print(line)
    if report["lines_cut_to_learn_the_vocabulary"]:
        print(f"cut {report['lines_cut_to_learn_the_vocabulary']} long lines to learn the vocabulary from them")
    print(
        f"{folder}: {report['documents']} documents ({report['duplicates']} duplicates dropped), "
        f"{report['text_bytes'] / 1e6:.1f} MB of text, vocabulary {report['vocab_size']}, "
        f"{report['characters_per_token']:.2f} characters per token, {time_spent}"
    )
    for split in SPLITS:
        counts = report[split]
        print(
            f"  {split}: {counts['documents']} documents, {counts['characters']} characters, {counts['tokens']} tokens"
        )
    _warn_of_a_small_split(folder, {split: report[split]["tokens"] for split in SPLITS})


def _warn_of_a_small_split(folder: Path, tokens: dict[str, int]) -> None:
    """Warn if a split is too small for sequences of a usual length; training refuses it, perhaps hours later."""
    for split, count in tokens.items():
        if 0 < count <= _USUAL_SEQ_LENGTH:
            remedy = "raise --validation-fraction" if split == "validation" else "give more text"
            print_warning(
                f"{folder}: the {split} split has {count} tokens, so a run with model.seq_length above {count - 1} "
                f"refuses it; {remedy}"
            )


if __name__ == "__main__":
    run_command(main)
