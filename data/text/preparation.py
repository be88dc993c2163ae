"""The stages that turn text into a dataset. Each is a list of jobs, a job writes its result in one rename, and a job
whose result exists is not done again: so a killed preparation goes on where it stopped.

    scan    a job a part    hash every document; set aside some text for the tokenizer
    merge   one job         mark duplicates; set the validation threshold; train the tokenizer
    encode  a job a part    tokens of the kept documents, train and validation apart
    pack    a job a shard   cut the concatenated tokens into shards of equal size
    finish  one job         manifest and report; the work folder goes

A document is a duplicate if an earlier one (in the order of the sorted input files) has the same text. It belongs to
validation if the first 8 bytes of its hash, as a number, are below the threshold. So neither the number of workers nor
the order in which jobs run changes a byte of the result.
"""

import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch.sources import MANIFEST_NAME
from data.shards.manifest import MAX_SHARDS, SPLITS, TOKENIZER, ShardInfo, load_manifest, manifest_json
from data.shards.tar_layout import token_dtype_for
from data.shards.tokenizer import Tokenizer, train_tokenizer
from data.shards.writer import write_shard
from data.text.documents import Slice, read_documents
from data.text.duplicates import first_occurrences, read_hashes
from data.text.encoded_part import EncodedPart, document_starts_in

WORK = ".work"
REPORT = "report.json"
_ALL = 1 << 64


@dataclass(frozen=True)
class Settings:
    """Everything the result depends on besides the input files."""

    vocab_size: int | None
    tokenizer_sha256: str | None
    tokenizer_megabytes: float
    validation_fraction: float
    shard_megabytes: float
    text_key: str
    skip_bad_text: bool


@dataclass(frozen=True)
class Preparation:
    """One dataset in the making: its folder, settings, and the size of each part's text in bytes.

    Which files a part holds is written in the work folder: a list of millions would be too much for every worker.
    """

    output: Path
    settings: Settings
    part_bytes: tuple[int, ...]

    @property
    def work(self) -> Path:
        return self.output / WORK

    def result(self, stage: str, job: int) -> Path:
        """The file that marks a job as done, with what later stages need of it."""
        return self.work / stage / f"{job:06d}.json"

    def file(self, stage: str, job: int, suffix: str) -> Path:
        return self.work / stage / f"{job:06d}.{suffix}"

    def write_parts(self, parts: list[list[Slice]]) -> None:
        for part, slices in enumerate(parts):
            if not self.file("plan", part, "json").exists():
                write_whole(self.file("plan", part, "json"), json.dumps(slices).encode())

    def slices(self, part: int) -> list[Slice]:
        return [Slice(*piece) for piece in json.loads(self.file("plan", part, "json").read_text())]

    def results(self, stage: str) -> list[dict[str, Any]]:
        """What every job of a stage left, in order; raises DataError where one has not been done."""
        missing = [job for job in range(self.num_jobs(stage)) if not self.result(stage, job).exists()]
        if missing:
            raise DataError(f"{self.output}: stage {stage} lacks {len(missing)} of its jobs; run --stage {stage} first")
        return [json.loads(self.result(stage, job).read_text()) for job in range(self.num_jobs(stage))]

    def num_jobs(self, stage: str) -> int:
        if stage in ("scan", "encode"):
            return len(self.part_bytes)
        return len(shard_plan(self)) if stage == "pack" else 1

    def weight(self, stage: str, job: int) -> int:
        """Bytes of work in a job, for the progress bar."""
        if stage in ("scan", "encode"):
            return self.part_bytes[job]
        return int(self.settings.shard_megabytes * 1e6) if stage == "pack" else 1


def run_job(preparation: Preparation, stage: str, job: int) -> None:
    """Do one job of a stage unless its result is there."""
    result = preparation.result(stage, job)
    if result.exists():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    summary = _STAGES[stage](preparation, job)
    if stage != "finish":
        write_whole(result, json.dumps(summary).encode())


def _documents(preparation: Preparation, part: int, skipped: list[str]) -> Iterator[tuple[str, str, bytes, bytes]]:
    """(text, source, UTF-8 bytes, 16-byte hash) of every document of a part; a bad file is skipped only if so set."""
    for piece in preparation.slices(part):
        try:
            for document in read_documents(piece, preparation.settings.text_key):
                raw = document.text.encode("utf-8")
                yield document.text, document.source, raw, hashlib.sha256(raw).digest()[:16]
        except DataError as error:
            if not preparation.settings.skip_bad_text:
                raise
            skipped.append(str(error))


def _scan(preparation: Preparation, part: int) -> dict[str, Any]:
    share = _tokenizer_share(preparation)
    validation = int(preparation.settings.validation_fraction * _ALL)
    hashes, documents, text_bytes, skipped = bytearray(), 0, 0, list[str]()
    with gzip.open(_partial(preparation.file("scan", part, "sample.gz")), "wb", compresslevel=1) as sample:
        for text, _, raw, digest in _documents(preparation, part, skipped):
            hashes += digest
            text_bytes += len(raw)
            in_train = int.from_bytes(digest[:8], "little") >= validation
            if in_train and int.from_bytes(digest[8:], "little") < share:
                sample.write(json.dumps([documents, text]).encode() + b"\n")
            documents += 1
    _partial(preparation.file("scan", part, "sample.gz")).rename(preparation.file("scan", part, "sample.gz"))
    write_whole(preparation.file("scan", part, "hashes"), hashes)
    return {"documents": documents, "text_bytes": text_bytes, "skipped": skipped}


def _tokenizer_share(preparation: Preparation) -> int:
    """Documents whose second hash half is below this lend their text to the tokenizer's training."""
    if preparation.settings.tokenizer_sha256 is not None:
        return 0
    total = sum(preparation.part_bytes)
    return min(_ALL, int(preparation.settings.tokenizer_megabytes * 1e6 / max(total, 1) * _ALL))


def _merge(preparation: Preparation, _: int) -> dict[str, Any]:
    counts = [scan["documents"] for scan in preparation.results("scan")]
    if not sum(counts):
        raise DataError("the input holds no text; give files with text to --input")
    files = [preparation.file("scan", part, "hashes") for part in range(len(counts))]
    keep = first_occurrences(files, counts)
    ends = np.cumsum(counts)
    lowest = _ALL
    for part, end in enumerate(ends):
        kept = keep[end - counts[part] : end]
        write_whole(preparation.file("merge", part, "keep"), np.packbits(kept).tobytes())
        if kept.any():
            lowest = min(lowest, int(read_hashes(files[part])["high"][kept].min()))
    threshold = int(preparation.settings.validation_fraction * _ALL)
    if threshold and int(keep.sum()) == 1:
        raise DataError(
            "the input is a single document, which cannot serve both training and validation; give more files, "
            "or --validation-fraction 0"
        )
    if (
        threshold and lowest >= threshold
    ):  # a small input: let the document with the lowest hash be the validation split
        threshold = lowest + 1
    if preparation.settings.tokenizer_sha256 is None:
        write_whole(preparation.output / TOKENIZER, _train_tokenizer(preparation, counts, keep))
    return {"kept": int(keep.sum()), "threshold": threshold}


def _train_tokenizer(preparation: Preparation, counts: list[int], keep: NDArray[np.bool_]) -> bytes:
    starts = np.cumsum([0, *counts])

    def lines() -> Iterator[str]:
        for part in range(len(counts)):
            with gzip.open(preparation.file("scan", part, "sample.gz")) as sample:
                for entry in sample:
                    number, text = json.loads(entry)
                    if keep[starts[part] + number]:
                        yield from (line for line in text.split("\n") if line)

    if next(lines(), None) is None:
        raise DataError(
            f"--tokenizer-megabytes {preparation.settings.tokenizer_megabytes}: no document was set aside to learn the "
            "vocabulary from; raise it"
        )
    assert preparation.settings.vocab_size is not None
    return train_tokenizer(lines(), preparation.settings.vocab_size)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _encode(preparation: Preparation, part: int) -> dict[str, Any]:
    tokenizer = _tokenizer(preparation.output / TOKENIZER)
    threshold = json.loads(preparation.result("merge", 0).read_text())["threshold"]
    hashes = read_hashes(preparation.file("scan", part, "hashes"))
    packed = np.fromfile(preparation.file("merge", part, "keep"), dtype=np.uint8)
    keep = np.unpackbits(packed, count=len(hashes)).astype(bool)
    outputs = {split: EncodedPart(preparation.file("encode", part, split), tokenizer) for split in SPLITS}
    number = -1
    for number, (text, source, raw, digest) in enumerate(_documents(preparation, part, [])):
        if number >= len(hashes) or digest != hashes[number].tobytes():
            raise DataError(
                f"{source}: changed since it was scanned; leave the input alone, or start over with --overwrite"
            )
        if keep[number]:
            is_validation = int.from_bytes(digest[:8], "little") < threshold
            outputs["validation" if is_validation else "train"].add(text, len(raw), source)
    if number + 1 != len(hashes):
        raise DataError(
            f"part {part} has {number + 1} documents, {len(hashes)} when scanned; start over with --overwrite"
        )
    return {split: output.close() for split, output in outputs.items()}


def shard_plan(preparation: Preparation) -> list[tuple[str, int, int, int]]:
    """(split, number in the split, first and last + 1 token of the split) of every shard: as few as fit, all alike.

    Raises DataError where the manifest could not hold so many.
    """
    encoded = preparation.results("encode")
    itemsize = np.dtype(token_dtype_for(_tokenizer(preparation.output / TOKENIZER).vocab_size)).itemsize
    shard_tokens = max(1, int(preparation.settings.shard_megabytes * 1e6) // itemsize)
    plan = []
    for split in SPLITS:
        total = sum(part[split]["tokens"] for part in encoded)
        count = -(-total // shard_tokens)
        if count > MAX_SHARDS:
            raise DataError(
                f"the {split} split would have {count} shards, at most {MAX_SHARDS}; raise --shard-megabytes"
            )
        plan += [(split, i, total * i // count, total * (i + 1) // count) for i in range(count)]
    return plan


def _pack(preparation: Preparation, job: int) -> dict[str, Any]:
    split, number, first, last = shard_plan(preparation)[job]
    dtype = token_dtype_for(_tokenizer(preparation.output / TOKENIZER).vocab_size)
    path = preparation.output / f"{split}-{number:06d}.tar"
    pieces, documents, start = [], list[Iterator[tuple[int, str]]](), 0
    for part, summary in enumerate(preparation.results("encode")):
        end = start + summary[split]["tokens"]
        if max(start, first) < min(end, last):
            tokens = np.memmap(preparation.file("encode", part, f"{split}.tokens"), dtype=dtype, mode="r")
            pieces.append(tokens[max(first - start, 0) : last - start])
            lines = preparation.file("encode", part, f"{split}.documents")
            documents.append(document_starts_in(lines, start, first, last))
        start = end
    info = write_shard(path, np.concatenate(pieces), dtype)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        for entry in itertools.chain(*documents):
            file.write(json.dumps(entry).encode() + b"\n")
    write_whole(path.with_suffix(".documents.jsonl.gz"), packed.getvalue())
    return {"split": split, "shard": vars(info)}


def _finish(preparation: Preparation, _: int) -> None:
    tokenizer = _tokenizer(preparation.output / TOKENIZER)
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for result in preparation.results("pack"):
        shards[result["split"]].append(ShardInfo(**result["shard"]))
    report = _report(preparation, tokenizer)
    write_whole(preparation.output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    dtype = token_dtype_for(tokenizer.vocab_size)
    model = (preparation.output / TOKENIZER).read_bytes()
    text = manifest_json("tokens", tokenizer.end_of_document, tokenizer.vocab_size, model, dtype, shards)
    write_whole(preparation.output / MANIFEST_NAME, text.encode())
    load_manifest(preparation.output)
    for left_by_a_kill in preparation.output.glob("*.partial"):
        left_by_a_kill.unlink()
    shutil.rmtree(preparation.work)


def _report(preparation: Preparation, tokenizer: Tokenizer) -> dict[str, Any]:
    scans, encoded = preparation.results("scan"), preparation.results("encode")
    documents = sum(scan["documents"] for scan in scans)
    totals = {split: {key: sum(part[split][key] for part in encoded) for key in encoded[0][split]} for split in SPLITS}
    tokens = sum(split["tokens"] for split in totals.values())
    characters = sum(split["characters"] for split in totals.values())
    return {
        "documents": documents,
        "duplicates": documents - preparation.results("merge")[0]["kept"],
        "text_bytes": sum(scan["text_bytes"] for scan in scans),
        "skipped": [line for scan in scans for line in scan["skipped"]],
        "vocab_size": tokenizer.vocab_size,
        "characters_per_token": round(characters / max(tokens, 1), 4),
        **totals,
        "settings": dataclasses.asdict(preparation.settings),
    }


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, content: bytes | bytearray) -> None:
    """Write a file in one rename, also where tasks on other machines write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.rename(path)


_STAGES: dict[str, Callable[[Preparation, int], dict[str, Any] | None]] = {
    "scan": _scan,
    "merge": _merge,
    "encode": _encode,
    "pack": _pack,
    "finish": _finish,
}
STAGES = tuple(_STAGES)
