"""Turn text into a dataset in five stages, each a list of jobs.

    scan    one job per part    hash every document; set aside some text for the tokenizer
    merge   one job             mark duplicates; set the validation threshold; train the tokenizer
    encode  one job per part    encode the kept documents, train and validation apart
    pack    one job per shard   cut the concatenated tokens into shards of equal size
    finish  one job             write manifest and report; remove the work folder

A job writes its result in one rename. A job whose result exists is not run again, so a killed preparation continues
where it stopped.

A document is a duplicate if an earlier one has the same text; the order is that of the sorted input files. A document
belongs to validation if its file is held out or, if none is, if the first 8 bytes of its hash, as a number, are below
the threshold. So neither the number of workers nor the order of jobs changes a byte of the result.
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch.sources import MANIFEST_NAME
from data.files.own import write_atomically
from data.shards import document_list
from data.shards.manifest import MAX_SHARDS, REPORT, SPLITS, TOKENIZER, ShardInfo, load_manifest, manifest_json
from data.shards.tar_layout import token_dtype_for
from data.shards.tokenizer import Tokenizer, learnable, train_tokenizer
from data.shards.writer import write_shard
from data.text.account import Account, FileAccount
from data.text.documents import read_documents
from data.text.duplicates import first_occurrences, read_hashes
from data.text.encoded_part import EncodedPart, document_starts_in
from data.text.input_files import Slice, matches

WORK = ".work"
PLAN = "plan.sha256"
_LASTING = rf"(?:{'|'.join(SPLITS)})-\d{{6,}}\.(?:tar|digests|documents\.jsonl\.gz)|" + "|".join(
    re.escape(name) for name in (MANIFEST_NAME, TOKENIZER, "report.json", PLAN)
)
OWN_NAME = re.compile(rf"{_LASTING}|(?:{_LASTING})\.partial|\.(?:{_LASTING})\.[0-9a-f]{{8}}\.tmp")
"""Names of the files that a preparation writes beside its work folder, also of unfinished ones."""
_ALL = 1 << 64


@dataclass(frozen=True)
class Settings:
    """Everything besides the input files that the result depends on. data.prepare --help explains each."""

    vocab_size: int | None
    tokenizer_sha256: str | None
    tokenizer_megabytes: float
    validation_fraction: float
    hold_out: list[str]
    shard_megabytes: float
    text_key: str
    skip_bad_text: bool

    def holds_out(self, path: str) -> bool:
        """Return whether the documents of an input file are the validation split's."""
        return matches(Path(path), self.hold_out)


@dataclass(frozen=True)
class Preparation:
    """A dataset being prepared: its folder, its settings, and the size of each part's text in bytes.

    The files of each part are listed in the work folder, since a list of millions is too large to send to each worker.
    """

    output: Path
    settings: Settings
    part_bytes: tuple[int, ...]

    @property
    def work(self) -> Path:
        """The work folder, which exists until the dataset is finished."""
        return self.output / WORK

    @property
    def named_files(self) -> Path:
        """The account of the files named: how many there are, and what became of those in no part."""
        return self.work / "plan" / "named.json"

    def result(self, stage: str, job: int) -> Path:
        """Return the file that marks a job as done. It holds what later stages need."""
        return self.work / stage / f"{job:06d}.json"

    def file(self, stage: str, job: int, suffix: str) -> Path:
        """Return another file of a job."""
        return self.work / stage / f"{job:06d}.{suffix}"

    def write_parts(self, parts: list[list[Slice]], account: Account) -> None:
        """Write the slices of each part, and the account of what is in none, to the work folder."""
        (self.work / "plan").mkdir(parents=True, exist_ok=True)
        if not self.named_files.exists():
            write_atomically(self.named_files, json.dumps(account.to_json()).encode())
        for part, slices in enumerate(parts):
            if not self.file("plan", part, "json").exists():
                write_atomically(self.file("plan", part, "json"), json.dumps(slices).encode())

    def slices(self, part: int) -> list[Slice]:
        """Return the slices of a part."""
        return [Slice(*piece) for piece in json.loads(self.file("plan", part, "json").read_text())]

    def results(self, stage: str) -> list[dict[str, Any]]:
        """Return the results of a stage's jobs, in order; raise DataError if one is missing."""
        missing = [job for job in range(self.num_jobs(stage)) if not self.result(stage, job).exists()]
        if missing:
            raise DataError(f"{self.output}: stage {stage} lacks {len(missing)} of its jobs; run --stage {stage} first")
        return [json.loads(self.result(stage, job).read_text()) for job in range(self.num_jobs(stage))]

    def num_jobs(self, stage: str) -> int:
        """Return how many jobs a stage has."""
        if stage in ("scan", "encode"):
            return len(self.part_bytes)
        return len(shard_plan(self)) if stage == "pack" else 1

    def weight(self, stage: str, job: int) -> int:
        """Return the size of a job for the progress bar, in the unit of its stage."""
        return self.part_bytes[job] if UNITS[stage] == "B" else 1


def run_job(preparation: Preparation, stage: str, job: int) -> None:
    """Run one job of a stage unless its result exists."""
    result = preparation.result(stage, job)
    if result.exists():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    summary = _STAGES[stage](preparation, job)
    if stage != "finish":
        write_atomically(result, json.dumps(summary).encode())


def _documents(
    preparation: Preparation, part: int, files: "_FilesOfAPart"
) -> Iterator[tuple[str, str, bytes, bytes, bool]]:
    """Yield (text, source, UTF-8 bytes, 16-byte hash, whether it is held out) for each document of a part."""
    for piece in preparation.slices(part):
        held_out = preparation.settings.holds_out(piece.path)
        file = FileAccount(*piece, skip=preparation.settings.skip_bad_text)
        for document in read_documents(piece, preparation.settings.text_key, file):
            raw = document.text.encode("utf-8")
            yield document.text, document.source, raw, hashlib.sha256(raw).digest()[:16], held_out
        files.add(file)


class _FilesOfAPart:
    """The account of a part. Its first and last file stay open, since the parts around it may read of them too."""

    def __init__(self) -> None:
        self.account = Account()
        self._first: FileAccount | None = None
        self._last: FileAccount | None = None

    def add(self, file: FileAccount) -> None:
        """Add a slice, which comes after all before."""
        if self._last is not None and self._last.path == file.path:
            self._last.join(file)
            return
        if self._last is not None and self._last is not self._first:
            self.account.merge(self._last.close())
        self._first, self._last = self._first or file, file

    def to_json(self) -> dict[str, Any]:
        """Return the account and the open files."""
        ends = [self._first] if self._first is self._last else [self._first, self._last]
        return {"account": self.account.to_json(), "ends": [file.to_json() for file in ends if file is not None]}


def account_of_inputs(preparation: Preparation) -> Account:
    """Return what became of all files named; raise DataError if the numbers do not add up."""
    account = Account.from_json(json.loads(preparation.named_files.read_text()))
    open_file: FileAccount | None = None
    for scan in preparation.results("scan"):
        if "files" not in scan:
            raise DataError(f"{preparation.output}: scanned by an earlier version; start over with --overwrite")
        account.merge(Account.from_json(scan["files"]["account"]))
        for file in map(FileAccount.from_json, scan["files"]["ends"]):
            if open_file is not None and open_file.path == file.path:
                open_file.join(file)
                continue
            if open_file is not None:
                account.merge(open_file.close())
            open_file = file
    if open_file is not None:
        account.merge(open_file.close())
    account.check()
    return account


def _scan(preparation: Preparation, part: int) -> dict[str, Any]:
    share = _tokenizer_share(preparation)
    validation = int(preparation.settings.validation_fraction * _ALL)
    hashes, documents, text_bytes, files = bytearray(), 0, 0, _FilesOfAPart()
    with gzip.open(_partial(preparation.file("scan", part, "sample.gz")), "wb", compresslevel=1) as sample:
        for text, _, raw, digest, held_out in _documents(preparation, part, files):
            hashes += digest
            text_bytes += len(raw)
            in_train = not held_out and int.from_bytes(digest[:8], "little") >= validation
            if in_train and int.from_bytes(digest[8:], "little") < share:
                sample.write(json.dumps([documents, text]).encode() + b"\n")
            documents += 1
    _partial(preparation.file("scan", part, "sample.gz")).rename(preparation.file("scan", part, "sample.gz"))
    write_atomically(preparation.file("scan", part, "hashes"), hashes)
    return {"documents": documents, "text_bytes": text_bytes, "files": files.to_json()}


def _tokenizer_share(preparation: Preparation) -> int:
    """Return the threshold below which a document's second half of the hash selects it to train the tokenizer."""
    if preparation.settings.tokenizer_sha256 is not None:
        return 0
    total = sum(preparation.part_bytes)
    return min(_ALL, int(preparation.settings.tokenizer_megabytes * 1e6 / max(total, 1) * _ALL))


def _merge(preparation: Preparation, _: int) -> dict[str, Any]:
    counts = [scan["documents"] for scan in preparation.results("scan")]
    if not sum(counts):
        lost = "; ".join(line.strip() for line in account_of_inputs(preparation).lines())
        raise DataError(f"the input holds no text; give files with text to --input ({lost})")
    files = [preparation.file("scan", part, "hashes") for part in range(len(counts))]
    keep = first_occurrences(files, counts)
    ends = np.cumsum(counts)
    lowest = _ALL
    for part, end in enumerate(ends):
        kept = keep[end - counts[part] : end]
        write_atomically(preparation.file("merge", part, "keep"), np.packbits(kept).tobytes())
        if kept.any():
            lowest = min(lowest, int(read_hashes(files[part])["high"][kept].min()))
    threshold = int(preparation.settings.validation_fraction * _ALL)
    if threshold and int(keep.sum()) == 1:
        raise DataError(
            "the input is a single document, which cannot serve both training and validation; give more files, "
            "or --validation-fraction 0"
        )
    if threshold and lowest >= threshold:
        threshold = lowest + 1  # a small input: the document with the lowest hash becomes the validation split
    cut_lines = 0
    if preparation.settings.tokenizer_sha256 is None:
        model, cut_lines = _train_tokenizer(preparation, counts, keep)
        write_atomically(preparation.output / TOKENIZER, model)
    return {"kept": int(keep.sum()), "threshold": threshold, "cut_lines": cut_lines}


def _train_tokenizer(preparation: Preparation, counts: list[int], keep: NDArray[np.bool_]) -> tuple[bytes, int]:
    """Return the serialized tokenizer, and the number of lines that were cut for SentencePiece to take them."""
    starts, cut_lines = np.cumsum([0, *counts]), 0

    def lines() -> Iterator[str]:
        nonlocal cut_lines
        cut_lines = 0
        for part in range(len(counts)):
            with gzip.open(preparation.file("scan", part, "sample.gz")) as sample:
                for entry in sample:
                    number, text = json.loads(entry)
                    if keep[starts[part] + number]:
                        for line in text.split("\n"):
                            pieces = list(learnable(line))
                            cut_lines += len(pieces) > 1
                            yield from pieces

    if next(lines(), None) is None:
        raise DataError(
            f"--tokenizer-megabytes {preparation.settings.tokenizer_megabytes}: no document was set aside to learn the "
            "vocabulary from; raise it"
        )
    assert preparation.settings.vocab_size is not None
    return train_tokenizer(lines(), preparation.settings.vocab_size), cut_lines


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
    for number, (text, source, raw, digest, held_out) in enumerate(_documents(preparation, part, _FilesOfAPart())):
        if number >= len(hashes) or digest != hashes[number].tobytes():
            raise DataError(
                f"{source}: changed since it was scanned; leave the input alone, or start over with --overwrite"
            )
        if keep[number]:
            is_validation = held_out or int.from_bytes(digest[:8], "little") < threshold
            outputs["validation" if is_validation else "train"].add(text, len(raw), source)
    if number + 1 != len(hashes):
        raise DataError(
            f"part {part} has {number + 1} documents, {len(hashes)} when scanned; start over with --overwrite"
        )
    return {split: output.close() for split, output in outputs.items()}


def shard_plan(preparation: Preparation) -> list[tuple[str, int, int, int]]:
    """Return (split, number in the split, first token, last token + 1) for each shard; tokens count in the split.

    There are as few shards as fit, all of about the same size.

    Raises:
        DataError: There are more shards than a manifest may list.
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
    write_atomically(
        path.with_suffix(document_list.SUFFIX), document_list.pack_document_list(itertools.chain(*documents))
    )
    return {"split": split, "shard": vars(info)}


def _finish(preparation: Preparation, _: int) -> None:
    tokenizer = _tokenizer(preparation.output / TOKENIZER)
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for result in preparation.results("pack"):
        shards[result["split"]].append(ShardInfo(**result["shard"]))
    report = _report(preparation, tokenizer)
    write_atomically(preparation.output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    dtype = token_dtype_for(tokenizer.vocab_size)
    model = (preparation.output / TOKENIZER).read_bytes()
    text = manifest_json("tokens", tokenizer.end_of_document, tokenizer.vocab_size, model, dtype, shards)
    write_atomically(preparation.output / MANIFEST_NAME, text.encode())
    load_manifest(preparation.output)
    for path in list(preparation.output.iterdir()):
        if OWN_NAME.fullmatch(path.name) and path.suffix in (".partial", ".tmp"):  # left by a kill
            path.unlink()
    shutil.rmtree(preparation.work)


def _report(preparation: Preparation, tokenizer: Tokenizer) -> dict[str, Any]:
    scans, encoded = preparation.results("scan"), preparation.results("encode")
    merge = preparation.results("merge")[0]
    documents = sum(scan["documents"] for scan in scans)
    account = account_of_inputs(preparation)
    totals = {split: {key: sum(part[split][key] for part in encoded) for key in encoded[0][split]} for split in SPLITS}
    tokens = sum(split["tokens"] for split in totals.values())
    characters = sum(split["characters"] for split in totals.values())
    written = sum(split["documents"] for split in totals.values())
    if written != merge["kept"]:
        raise DataError(f"the documents do not add up: {merge['kept']} to write, {written} written; use --overwrite")
    return {
        "documents": documents,
        "duplicates": documents - merge["kept"],
        "text_bytes": sum(scan["text_bytes"] for scan in scans),
        "inputs": account.to_json(),
        "lines_cut_to_learn_the_vocabulary": merge["cut_lines"],
        "vocab_size": tokenizer.vocab_size,
        "characters_per_token": round(characters / max(tokens, 1), 4),
        **totals,
        "settings": dataclasses.asdict(preparation.settings),
    }


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


_STAGES: dict[str, Callable[[Preparation, int], dict[str, Any] | None]] = {
    "scan": _scan,
    "merge": _merge,
    "encode": _encode,
    "pack": _pack,
    "finish": _finish,
}
STAGES = tuple(_STAGES)
UNITS = {"scan": "B", "merge": "step", "encode": "B", "pack": "shard", "finish": "step"}
"""What the progress bar of a stage counts."""
