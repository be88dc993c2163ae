"""Read and write the manifest of a prepared dataset, which lists its files and the digests that verify them.

    dataset/
      manifest.json                     the manifest
      tokenizer.model                   the SentencePiece model
      train-000000.tar                  a webdataset shard of tokens (data/shards/tar_layout.py)
      train-000000.digests              the digest of every 16 KiB of that shard (data/shards/verified_file.py)
      train-000000.documents.jsonl.gz   which document starts where (data/shards/document_list.py)
      validation-000000.tar ...
      report.json                       what was read, dropped and counted
      plan.sha256                       hash of input and settings, by which data.prepare recognizes its own work

A dataset of text shards (data/shards/text_shard.py) has the same files, but its .tar files come from someone else and
may lie elsewhere. A mixture of datasets is a Manifest too (data/stream/mixture.py).

A manifest is untrusted input. File names cannot leave the dataset's folder. Sizes are bounded and must agree with each
other. The `fingerprint` covers every field that the order or the content of samples depends on.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DamagedShardError, DataError
from data.fetch.sources import MANIFEST_NAME, LocalSource, ReadOptions, Source, open_source
from data.files.strict_json import parse_json, to_json
from data.shards.tar_layout import DTYPES, shard_bytes

FORMAT = "entropy-guided-tokens"
VERSION = 1
SPLITS = ("train", "validation")
CONTENTS = ("tokens", "text")
TOKENIZER = "tokenizer.model"
REPORT = "report.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_SHARDS = 100_000  # at no more than 500 bytes each, so that the manifest stays below MAX_MANIFEST_BYTES
MAX_SHARD_BYTES = 16 << 30
MAX_TOKENIZER_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name, its size in tokens and bytes, and the sha256 of the file and of its digest list."""

    name: str
    num_tokens: int
    num_bytes: int
    sha256: str
    digests_sha256: str

    @property
    def digests_name(self) -> str:
        """Name of the digest list beside the shard."""
        return self.name.removesuffix(".tar") + ".digests"

    def num_samples(self, seq_length: int) -> int:
        """Return how many samples the shard holds. Neighbours share one token: a label of one, an input of the next."""
        return max(0, self.num_tokens - 1) // seq_length


@dataclass(frozen=True)
class Stage:
    """The weights of a mixture's datasets, which apply from `from_tokens` tokens on."""

    from_tokens: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset, as its manifest describes it. No shard is opened.

    Attributes:
        source: Where the manifest, the tokenizer and the digest lists are.
        shard_source: Where the .tar files are.
        content: "tokens" or "text".
        vocab_size: Number of token ids.
        end_of_document: Id of the token that ends each document.
        tokenizer_sha256: Hash of the tokenizer's file.
        tokenizer_bytes: Size of the tokenizer's file.
        token_dtype: "uint16" or "uint32".
        text_key: Key of the text in the .json members of text shards.
        shards: The shards of each split, in order.
        fingerprint: Identity of the dataset. Two datasets with the same fingerprint give the same samples.
    """

    source: Source
    shard_source: Source
    content: str
    vocab_size: int
    end_of_document: int
    tokenizer_sha256: str
    tokenizer_bytes: int
    token_dtype: str
    text_key: str
    shards: dict[str, tuple[ShardInfo, ...]]
    fingerprint: str

    @property
    def datasets(self) -> "tuple[Manifest, ...]":
        """The datasets that samples are read from: the members of a mixture, else this one alone."""
        return (self,)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """How a mixture weighs its datasets over time; empty for a plain dataset."""
        return ()

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer as a local file.

        Raises:
            DataError: It cannot be fetched, or is not the one that made the tokens.
        """
        try:
            path = self.source.fetch(TOKENIZER, self.tokenizer_sha256, self.tokenizer_bytes)
            found = hashlib.sha256(LocalSource(path.parent).read(path.name, self.tokenizer_bytes)).hexdigest()
            if found != self.tokenizer_sha256 and self.source.forget(self.tokenizer_sha256):
                return self.tokenizer_path
        except DamagedShardError as error:
            raise DataError(str(error)) from error  # on_damage="skip" applies to shards alone
        if found != self.tokenizer_sha256:
            raise DataError(
                f"{path}: sha256 {found}, but the tokens were made with {self.tokenizer_sha256}; copy the dataset again"
            )
        return path

    def num_tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(shard.num_tokens for shard in self.shards[split])

    def num_samples(self, split: str, seq_length: int) -> int:
        """Return the number of samples in one epoch. A sample never crosses shards."""
        return sum(shard.num_samples(seq_length) for shard in self.shards[split])


def load_manifest(path: str | Path, options: ReadOptions | None = None, shards_address: str | None = None) -> Manifest:
    """Read and check the manifest of one prepared dataset. `data.stream.dataset.open_dataset` opens mixtures too.

    Args:
        path: A folder or a remote address (data/fetch/sources.py).
        options: How files are fetched and checked.
        shards_address: Where the shards are, if not beside the manifest.

    Raises:
        DataError: The manifest cannot be read or is damaged. One line names the field, its value and the remedy.
    """
    options = options or ReadOptions()
    source = open_source(path, options)
    raw = source.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    where = source.describe(MANIFEST_NAME)
    try:
        fields = parse_json(raw)
    except ValueError as error:
        raise DataError(f"{where}: damaged, not JSON ({error}); prepare or copy the dataset again") from error
    shard_source = source if shards_address is None else open_source(shards_address, options)
    return _parse(fields, source, shard_source, where)


def manifest_json(
    content: str,
    end_of_document: int,
    vocab_size: int,
    tokenizer: bytes,
    token_dtype: str,
    shards: dict[str, list[ShardInfo]],
    text_key: str = "",
) -> str:
    """Return the text of a manifest, fingerprint included.

    Args:
        content: "tokens" or "text".
        end_of_document: Id of the token that ends each document.
        vocab_size: Number of token ids.
        tokenizer: Content of the tokenizer's file.
        token_dtype: "uint16" or "uint32".
        shards: The shards of each split, in order.
        text_key: Key of the text in the .json members of text shards.
    """
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "content": content,
        "vocab_size": vocab_size,
        "end_of_document": end_of_document,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "tokenizer_bytes": len(tokenizer),
        "token_dtype": token_dtype,
        "text_key": text_key,
        "shards": {split: [vars(shard) for shard in shards[split]] for split in SPLITS},
    }
    return to_json({**fields, "fingerprint": _fingerprint(fields)}, indent=1) + "\n"


def _fingerprint(fields: dict[str, Any]) -> str:
    covered = {key: value for key, value in fields.items() if key != "fingerprint"}
    return hashlib.sha256(to_json(covered, sort_keys=True).encode()).hexdigest()


def _parse(fields: Any, source: Source, shard_source: Source, where: str) -> Manifest:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DataError(
            f'{where}: not the manifest of a prepared dataset ("format" is not "{FORMAT}"); run data.prepare'
        )
    if fields.get("version") != VERSION:
        raise DataError(f"{where}: version {fields.get('version')!r}, this program reads {VERSION}; prepare it again")
    fault = next(_faults(fields), None)
    if fault is not None:
        raise DataError(f"{where}: damaged, {fault}; prepare or copy the dataset again")
    plain = (
        "content",
        "vocab_size",
        "end_of_document",
        "tokenizer_sha256",
        "tokenizer_bytes",
        "token_dtype",
        "text_key",
        "fingerprint",
    )
    return Manifest(
        source=source,
        shard_source=shard_source,
        **{key: fields[key] for key in plain},
        shards={split: tuple(ShardInfo(**shard) for shard in fields["shards"][split]) for split in SPLITS},
    )


def _faults(fields: dict[str, Any]) -> Iterator[str]:
    """Yield the faults of a manifest. Later checks rely on earlier ones, so only the first fault is meaningful."""
    if str(fields.get("content")) not in CONTENTS:
        yield f"content is {fields.get('content')!r}, expected one of {', '.join(CONTENTS)}"
    if str(fields.get("token_dtype")) not in DTYPES:
        yield f"token_dtype is {fields.get('token_dtype')!r}, expected one of {', '.join(DTYPES)}"
    if not _is_count(fields.get("vocab_size"), 1 << 32):
        yield f"vocab_size is {fields.get('vocab_size')!r}, expected a positive whole number"
    end = fields.get("end_of_document")
    if end != 0 and not _is_count(end, fields["vocab_size"] - 1):
        yield f"end_of_document is {end!r}, expected a token id below vocab_size"
    if not _is_sha256(fields.get("tokenizer_sha256")):
        yield f"tokenizer_sha256 is {fields.get('tokenizer_sha256')!r}, expected 64 hexadecimal digits"
    if not _is_count(fields.get("tokenizer_bytes"), MAX_TOKENIZER_BYTES):
        yield f"tokenizer_bytes is {fields.get('tokenizer_bytes')!r}, expected 1 to {MAX_TOKENIZER_BYTES}"
    if not isinstance(fields.get("text_key"), str):
        yield f"text_key is {fields.get('text_key')!r}, expected a string"
    shards = fields.get("shards")
    if not isinstance(shards, dict) or any(not isinstance(shards.get(split), list) for split in SPLITS):
        yield f"shards must hold a list for each of {', '.join(SPLITS)}"
        return
    for split in SPLITS:
        for number, shard in enumerate(shards[split]):
            for fault in _shard_faults(shard, fields["content"], fields["token_dtype"]):
                yield f"shards.{split}[{number}]: {fault}"
    if fields.get("fingerprint") != _fingerprint(fields):
        yield f"fingerprint is {fields.get('fingerprint')!r} but the content gives {_fingerprint(fields)!r}"


def _shard_faults(shard: Any, content: str, token_dtype: str) -> Iterator[str]:
    if not isinstance(shard, dict) or set(shard) != set(ShardInfo.__dataclass_fields__):
        yield f"must hold exactly {', '.join(ShardInfo.__dataclass_fields__)}"
        return
    if not is_shard_name(shard["name"]):
        yield f"name {shard['name']!r} is not a plain file name ending in .tar"
    if not (_is_count(shard["num_tokens"], MAX_SHARD_BYTES) and _is_count(shard["num_bytes"], MAX_SHARD_BYTES)):
        yield f"num_tokens {shard['num_tokens']!r} and num_bytes {shard['num_bytes']!r} must be positive whole numbers"
        return
    expected = shard_bytes(shard["num_tokens"], token_dtype)
    if content == "tokens" and shard["num_bytes"] != expected:
        yield f"num_bytes is {shard['num_bytes']}, but {shard['num_tokens']} tokens make {expected}"
    if not (_is_sha256(shard["sha256"]) and _is_sha256(shard["digests_sha256"])):
        yield "sha256 and digests_sha256 must be 64 hexadecimal digits each"


def is_shard_name(value: Any) -> bool:
    """Return whether a value is a plain file name ending in .tar, which cannot leave a folder or run a command."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value.endswith(".tar")


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= limit


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
