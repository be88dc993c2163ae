"""Make a dataset of somebody else's webdataset shards of text, without copying them: `python -m data.index`.

    python -m data.index --address /data/shards --train 'a-*.tar' --tokenizer FILE --output DIR
    python -m data.index --address https://host/shards --train a-{000..019}.tar --validation a-020.tar ...

The shards are uncompressed tars with .txt members, or .json members that hold a text under --text-key; other members
are left alone. Each shard is read once, to note where its documents lie and how many tokens each makes. Training then
tokenizes on the fly, in the same exact order and with the same checks as for shards of tokens. Another tokenizer needs
another index.
"""

import argparse
import glob
import hashlib
import itertools
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.command_line import run_command, whole_number
from data.errors import DataError
from data.fetch.sources import MANIFEST_NAME, LocalSource, ReadOptions, open_source
from data.shards.manifest import MAX_SHARDS, SPLITS, TOKENIZER, ShardInfo, is_shard_name, load_manifest, manifest_json
from data.shards.tar_layout import CHUNK_BYTES, chunk_digest, token_dtype_for
from data.shards.text_shard import MAX_DOCUMENT_BYTES, member_text
from data.shards.tokenizer import Tokenizer

TEXT_SUFFIXES = {".txt": False, ".json": True}
_MAX_HEADER_BYTES = 1 << 20
_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Job(NamedTuple):
    address: str
    name: str
    output: Path
    tokenizer: Path
    text_key: str


class _Member(tarfile.TarInfo):
    """A member whose extended headers, which are read into memory whole, are small."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADER_TYPES and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--address", required=True, help="where the shards are: a folder, http(s)://, s3://, 'pipe:COMMAND {}'")
    add("--train", nargs="+", default=[], metavar="NAME", help="shards to train on; {000..019}, and globs in a folder")
    add("--validation", nargs="+", default=[], metavar="NAME", help="shards to validate on")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="the tokenizer.model to use")
    add(
        "--output", type=Path, required=True, metavar="DIR", help="the dataset's folder; created, or that of the shards"
    )
    add("--text-key", default="text", metavar="KEY", help='key of the text in .json members (default "text")')
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=whole_number(1, 4096), default=cores, metavar="N", help="processes (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    tokenizer = Tokenizer(options.tokenizer)
    names = {split: _expand(options.address, getattr(options, split)) for split in SPLITS}
    _check(options, names["train"] + names["validation"])
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(options.address, name, options.output, options.tokenizer, options.text_key)
        for split in SPLITS
        for name in names[split]
    ]
    infos = _index_all(jobs, options.workers)
    by_split = {"train": infos[: len(names["train"])], "validation": infos[len(names["train"]) :]}
    model = options.tokenizer.read_bytes()
    if not _holds(options.output / TOKENIZER, model):
        (options.output / TOKENIZER).write_bytes(model)
    dtype = token_dtype_for(tokenizer.vocab_size)
    text = manifest_json(
        "text", tokenizer.end_of_document, tokenizer.vocab_size, model, dtype, by_split, options.text_key
    )
    (options.output / MANIFEST_NAME).write_text(text)
    manifest = load_manifest(options.output)
    for split in SPLITS:
        print(f"{options.output}: {split}: {len(manifest.shards[split])} shards, {manifest.num_tokens(split)} tokens")
    if not _is_local(options.address):
        print(
            f'to read it, name a mixture file: {{"datasets": [{{"path": "{options.output.resolve()}", '
            f'"shards": "{options.address}"}}]}}'
        )


def _check(options: argparse.Namespace, names: list[str]) -> None:
    """Raises DataError before anything is written; the output may be the folder of the shards itself."""
    if not names:
        raise DataError(f"--address {options.address}: names no shard; see --train and --validation")
    if len(names) > MAX_SHARDS:
        raise DataError(f"--address {options.address}: {len(names)} shards, a dataset has at most {MAX_SHARDS}")
    for name in names:
        if not is_shard_name(name):
            raise DataError(
                f"{name!r} is no plain file name ending in .tar, of letters, digits, '.', '_' and '-' alone; "
                "rename or unpack the file, and name its folder with --address"
            )
    twice = next((name for name, other in itertools.pairwise(sorted(names)) if name == other), None)
    if twice is not None:
        raise DataError(f"{twice} is named twice by --train and --validation; name each shard once")
    if options.output.exists() and not options.output.is_dir():
        raise DataError(f"--output {options.output}: is a file; name a folder")
    if (options.output / MANIFEST_NAME).exists():
        raise DataError(f"--output {options.output}: holds a dataset; name another folder")
    there = options.output / TOKENIZER
    if there.exists() and not _holds(there, options.tokenizer.read_bytes()):
        raise DataError(f"{there}: is another tokenizer than {options.tokenizer}; name another folder with --output")


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _index_all(jobs: list[_Job], workers: int) -> list[ShardInfo]:
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        try:
            return list(tqdm(pool.map(_index_shard, jobs), total=len(jobs), desc="index", unit="shard"))
        except BrokenProcessPool as error:
            raise DataError("a worker was killed, perhaps for memory; run again with fewer --workers") from error


def _is_local(address: str) -> bool:
    return isinstance(open_source(address, ReadOptions()), LocalSource)


def _expand(address: str, patterns: list[str]) -> list[str]:
    """Plain shard names, in order; raises DataError for a pattern that matches nothing."""
    names: list[str] = []
    for pattern in patterns:
        for name in _ranges(pattern):
            found = sorted(glob.glob(name, root_dir=address)) if _is_local(address) else [name]
            if not found:
                raise DataError(f"{address}/{name}: no such shard; check --address and the names")
            names += found
    return names


def _ranges(pattern: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar; raises DataError for none or more than a dataset has."""
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


def _index_shard(job: _Job) -> ShardInfo:
    if _is_local(job.address):
        target = Path(os.path.realpath(Path(job.address) / job.name))
        info = _index_file(job, target)
        _link(job.output / job.name, target)
        return info
    with tempfile.TemporaryDirectory(dir=job.output) as folder:
        path = Path(folder) / "shard"
        with path.open("wb") as file:
            open_source(job.address, ReadOptions()).copy(job.name, file)
        return _index_file(job, path)


def _link(link: Path, target: Path) -> None:
    """Make `link` lead to `target`, unless it is that file; raises DataError rather than remove another file."""
    if os.path.realpath(link) == str(target):
        return
    if link.exists() and not link.is_symlink():
        raise DataError(f"{link}: another file is in the place of the link to {target}; name another --output")
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _index_file(job: _Job, path: Path) -> ShardInfo:
    tokenizer = Tokenizer(job.tokenizer)
    whole, digests, num_bytes = hashlib.sha256(), bytearray(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            digests += chunk_digest(chunk)
            num_bytes += len(chunk)
    documents = np.array(list(_documents(job, path, tokenizer)), dtype="<i8").reshape(-1, 4)
    if not len(documents):
        raise DataError(f"{job.name}: holds no .txt or .json member with text; leave it out")
    sidecar = bytes(digests) + documents.tobytes()
    info = ShardInfo(
        name=job.name,
        num_tokens=int(documents[:, 2].sum()),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        digests_sha256=hashlib.sha256(sidecar).hexdigest(),
    )
    (job.output / info.digests_name).write_bytes(sidecar)
    return info


def _documents(job: _Job, path: Path, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int, int]]:
    """(offset, size, tokens with the end of the document, is JSON) of every text member.

    A header in the middle that cannot be read, or a cut between members, would pass for the end of the archive.
    """
    name = "the first member"
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as archive:
            for member in archive:
                name = member.name
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                is_json = TEXT_SUFFIXES.get(Path(member.name).suffix)
                if not member.isreg() or is_json is None:
                    continue
                if member.size > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"{member.size} bytes, a document may have {MAX_DOCUMENT_BYTES}")
                text = member_text(_read(path, member), is_json, job.text_key)
                yield member.offset_data, member.size, len(tokenizer.encode(text)) + 1, int(is_json)
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{job.name}: no plain tar ({error}); unpack a compressed one first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{job.name}: {name!r}: no text ({error}); see --text-key") from error
    _require_end(job, path, end)


def _require_end(job: _Job, path: Path, end: int) -> None:
    """Nothing but zeros may follow the last member, and a block of them at least: else something is missing."""
    zeros = 0
    with path.open("rb") as file:
        file.seek(end)
        while rest := file.read(1 << 20):
            zeros += len(rest)
            if rest.strip(b"\0"):
                raise DataError(f"{job.name}: damaged near byte {end}: no header, yet not the end; copy it again")
    if zeros < tarfile.BLOCKSIZE:
        raise DataError(f"{job.name}: does not end as a tar does, so it may be cut short at byte {end}; copy it again")


def _read(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        raw = file.read(member.size)
    if len(raw) != member.size:
        raise ValueError(f"cut short at byte {member.offset_data + len(raw)}")
    return raw


if __name__ == "__main__":
    run_command(main)
