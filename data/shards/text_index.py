"""Index a webdataset shard of text: record where each document lies and how many tokens it makes.

The index is one file beside the shard. data/shards/text_shard.py describes its format and reads it.
"""

import hashlib
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.fetch.sources import ReadOptions, open_source
from data.files.address import is_remote, local_path
from data.shards.manifest import ShardInfo
from data.shards.tar_layout import CHUNK_BYTES, chunk_digest
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


class IndexJob(NamedTuple):
    """One shard to index: where it is, the folder of the index, the tokenizer, and the key of the text.

    `text_member` is the extension of the members that are the text, such as "txt"; None if each .txt or .json is.
    """

    address: str
    name: str
    output: Path
    tokenizer: Path
    text_key: str
    text_member: str | None = None


class _Member(tarfile.TarInfo):
    """A tar member that refuses large extended headers, which tarfile would read into memory as a whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADER_TYPES and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def counted(members: Counter[str]) -> str:
    """Return the most frequent kinds of members with their numbers, for a message."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(members.items(), key=lambda item: -item[1])[:5])


def index_shard(job: IndexJob) -> tuple[ShardInfo, Counter[str]]:
    """Index one shard. Return its entry for the manifest, and how many members are not the text, by extension.

    A local shard gets a link in the output folder. A remote shard is copied to a temporary file first.

    Raises:
        DataError: The shard is damaged or holds no text, or another file is where the link belongs.
    """
    if not is_remote(job.address):
        target = Path(os.path.realpath(local_path(job.address) / job.name))
        if not target.is_file():
            raise DataError(f"{target}: is no regular file; put the shard itself there, or leave it out")
        found = _index_file(job, target)
        _link(job.output / job.name, target)
        return found
    with tempfile.TemporaryDirectory(dir=job.output) as folder:
        path = Path(folder) / "shard"
        with path.open("wb") as file:
            open_source(job.address, ReadOptions(allow_commands=True)).copy(job.name, file)
        return _index_file(job, path)


def _link(link: Path, target: Path) -> None:
    """Link to `target` unless `link` is that file; raise DataError rather than remove another file."""
    if os.path.realpath(link) == str(target):
        return
    if link.exists() and not link.is_symlink():
        raise DataError(f"{link}: another file is where the link to {target} belongs; name another --output")
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _index_file(job: IndexJob, path: Path) -> tuple[ShardInfo, Counter[str]]:
    tokenizer = Tokenizer(job.tokenizer)
    whole, digests, num_bytes = hashlib.sha256(), bytearray(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            digests += chunk_digest(chunk)
            num_bytes += len(chunk)
    left_out: Counter[str] = Counter()
    documents = np.array(list(documents_in(job, path, tokenizer, left_out)), dtype="<i8").reshape(-1, 4)
    if not len(documents):
        wanted = f".{job.text_member}" if job.text_member else ".txt or .json"
        raise DataError(
            f"{job.name}: holds no {wanted} member with text, {counted(left_out) or 'nothing'} besides; leave it out"
        )
    sidecar = bytes(digests) + documents.tobytes()
    info = ShardInfo(
        name=job.name,
        num_tokens=int(documents[:, 2].sum()),
        num_bytes=num_bytes,
        sha256=whole.hexdigest(),
        digests_sha256=hashlib.sha256(sidecar).hexdigest(),
    )
    (job.output / info.digests_name).write_bytes(sidecar)
    return info, left_out


def documents_in(
    job: IndexJob, path: Path, tokenizer: Tokenizer, left_out: Counter[str] | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (offset, size, tokens with the end-of-document token, is JSON) for each text member.

    Args:
        job: The shard and what its text is.
        path: The shard's file.
        tokenizer: Counts the tokens.
        left_out: Where members that are not the text are counted, by extension.

    Raises:
        DataError: The archive is damaged or cut short, a member holds no text, or a sample has two kinds of text.
    """
    name = "the first member"
    sample, kind = None, ""
    left_out = Counter() if left_out is None else left_out
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as archive:
            for member in archive:
                name = member.name
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
                suffix = Path(member.name).suffix
                is_json = TEXT_SUFFIXES.get(suffix)
                key, extension = _sample_of(member.name)
                is_text = job.text_member is None or extension == job.text_member
                if not member.isreg() or is_json is None or not is_text:
                    if member.isreg():
                        left_out[suffix or "no extension"] += 1
                    continue
                if key == sample and suffix != kind:
                    raise DataError(
                        f"{job.name}: sample {key!r} has both a {kind} and a {suffix} member; say which is the text "
                        "with --text-member txt or --text-member json"
                    )
                sample, kind = key, suffix
                if member.size > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"{member.size} bytes, a document may have {MAX_DOCUMENT_BYTES}")
                text = member_text(_read(path, member), is_json, job.text_key)
                yield member.offset_data, member.size, len(tokenizer.encode(text)) + 1, int(is_json)
            end = archive.offset
    except DataError:
        raise
    except tarfile.TarError as error:
        raise DataError(f"{job.name}: not a plain tar ({error}); unpack a compressed one first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{job.name}: {name!r}: not text ({error}); see --text-key") from error
    _require_end(job, path, end)


def _sample_of(name: str) -> tuple[str, str]:
    """Return the key of a member's sample, and its extension without the dot, as webdataset divides names."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _require_end(job: IndexJob, path: Path, end: int) -> None:
    """Require at least a block of zeros, and nothing else, after the last member.

    tarfile takes an unreadable header, or a cut between members, for the end of the archive.
    """
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
