"""Fuzz every file of a dataset. Digests are made to fit, so that parsers see what a forger would send."""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.shards.document_list import documents_of, pack_document_list
from data.shards.manifest import _fingerprint, load_manifest, manifest_json
from data.shards.text_index import IndexJob, index_shard
from data.shards.text_shard import TextShard
from data.shards.token_shard import TokenShard
from data.shards.tokenizer import Tokenizer, train_tokenizer
from data.stream.dataset import open_dataset
from data.text.documents import read_documents
from data.text.input_files import Slice
from tests.data.made import make_dataset
from tests.fuzz.property import bytes_like, edited, fuzz, holds, json_like

OPTIONS = ReadOptions()
SHARD = "train-000000"


@functools.cache
def tokens_dataset() -> Path:
    return make_dataset(Path(tempfile.mkdtemp(prefix="fuzz-")) / "tokens", [5])


@functools.cache
def tokenizer_bytes() -> bytes:
    return train_tokenizer([f"def f{number}(x):\n    return x + {number}\n" for number in range(200)], 300)


def tar_bytes() -> bytes:
    """Return a small shard of text, with one member of each kind."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in (("a.txt", b"one two"), ("b.json", b'{"text": "three"}'), ("c.png", b"\x89PNG")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@functools.cache
def text_dataset() -> Path:
    """Index a shard of text."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "text"
    (folder / "shards").mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    (folder / "shards/a.tar").write_bytes(tar_bytes())
    info, _ = index_shard(IndexJob(str(folder / "shards"), "a.tar", folder, folder / "tokenizer.model", "text"))
    text = manifest_json("text", 2, 300, tokenizer_bytes(), "uint16", {"train": [info], "validation": []}, "text")
    (folder / "manifest.json").write_text(text)
    return folder


def sealed(content: bytes) -> bytes:
    """Return a manifest with the fingerprint of its content, if it is an object at all."""
    try:
        fields = json.loads(content)
        fields["fingerprint"] = _fingerprint(fields)
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError, AttributeError):
        return content


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


@fuzz(json_like(manifest_of(tokens_dataset())).map(sealed))
def test_a_manifest(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    holds(lambda: load_manifest(folder, OPTIONS), DataError)


MIXTURE = {
    "datasets": [{"path": str(tokens_dataset()), "weight": 3}],
    "stages": [{"from_tokens": 0, "weights": [1]}],
}


@fuzz(json_like(MIXTURE))
def test_a_mixture(content: bytes, folder: Path) -> None:
    (folder / "mixture.json").write_bytes(content)
    holds(lambda: open_dataset(folder / "mixture.json", OPTIONS), DataError)


@fuzz(bytes_like(tokenizer_bytes()))
def test_a_tokenizer(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    holds(lambda: Tokenizer(folder / "tokenizer.model"), DataError)


def read_all(open_shard: Callable[[], Any], num_tokens: int) -> None:
    """Read the first, the last and all tokens of a shard, and verify it."""
    shard = open_shard()
    try:
        shard.rows(np.array([0, max(num_tokens - 3, 0)]), min(3, num_tokens))
        shard.rows(np.array([0]), num_tokens)
        shard.verify_all()
    finally:
        shard.close()


@fuzz(bytes_like((tokens_dataset() / f"{SHARD}.tar").read_bytes()))
def test_a_shard_of_tokens(content: bytes, folder: Path) -> None:
    manifest = load_manifest(shutil.copytree(tokens_dataset(), folder / "set"), OPTIONS)
    (folder / f"set/{SHARD}.tar").write_bytes(content)
    info = manifest.shards["train"][0]
    holds(lambda: read_all(lambda: TokenShard(manifest, info), info.num_tokens), DataError)


@fuzz(bytes_like((tokens_dataset() / f"{SHARD}.digests").read_bytes()))
def test_digests_of_a_shard(content: bytes, folder: Path) -> None:
    manifest = load_manifest(shutil.copytree(tokens_dataset(), folder / "set"), OPTIONS)
    (folder / f"set/{SHARD}.digests").write_bytes(content)
    info = dataclasses.replace(manifest.shards["train"][0], digests_sha256=hashlib.sha256(content).hexdigest())
    holds(lambda: read_all(lambda: TokenShard(manifest, info), info.num_tokens), DataError)


@fuzz(bytes_like((text_dataset() / "a.digests").read_bytes()))
def test_the_index_of_a_shard_of_text(content: bytes, folder: Path) -> None:
    """The index says where documents lie: whatever it says, nothing outside the shard is read."""
    manifest = load_manifest(shutil.copytree(text_dataset(), folder / "set"), OPTIONS)
    (folder / "set/a.digests").write_bytes(content)
    sound = manifest.shards["train"][0]
    try:
        num_tokens = int(np.frombuffer(content[32:], "<i8").reshape(-1, 4)[:, 2].sum())
    except ValueError:
        num_tokens = sound.num_tokens
    if not 0 < num_tokens < 10_000:
        num_tokens = sound.num_tokens
    info = dataclasses.replace(sound, digests_sha256=hashlib.sha256(content).hexdigest(), num_tokens=num_tokens)
    holds(lambda: read_all(lambda: TextShard(manifest, info), info.num_tokens), DataError)


@fuzz(bytes_like(tar_bytes()))
def test_a_tar_to_index(content: bytes, folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "out").mkdir()
    (folder / "shards/a.tar").write_bytes(content)
    job = IndexJob(str(folder / "shards"), "a.tar", folder / "out", text_dataset() / "tokenizer.model", "text")

    def index_and_read() -> None:
        info, _ = index_shard(job)
        shutil.copy(text_dataset() / "tokenizer.model", folder / "out")
        shards = {"train": [info], "validation": []}
        text = manifest_json("text", 2, 300, tokenizer_bytes(), "uint16", shards, "text")
        (folder / "out/manifest.json").write_text(text)
        manifest = load_manifest(folder / "out", OPTIONS)
        read_all(lambda: TextShard(manifest, info), info.num_tokens)

    holds(index_and_read, DataError)


LIST = pack_document_list([(-3, "a/b.py:0"), (7, "c.txt:100")])


@fuzz(bytes_like(LIST) | edited(gzip.decompress(LIST)).map(functools.partial(gzip.compress, mtime=0)))
def test_a_list_of_documents(content: bytes, folder: Path) -> None:
    manifest = load_manifest(shutil.copytree(tokens_dataset(), folder / "set"), OPTIONS)
    (folder / f"set/{SHARD}.documents.jsonl.gz").write_bytes(content)

    def printable_sources() -> None:
        sources = documents_of(manifest, manifest.shards["train"][0], 0, 20)
        assert all(source.isprintable() for source in sources)

    holds(printable_sources, DataError)


LINES = b'{"text": "one"}\n{"text": "two \\u00e9"}\n'


@fuzz(bytes_like(LINES) | json_like({"text": "one"}))
def test_jsonl_to_prepare(content: bytes, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(content)
    holds(lambda: list(read_documents(Slice(str(folder / "a.jsonl"), 0, len(content)), "text")), DataError)


@fuzz(bytes_like(gzip.compress(LINES, mtime=0)))
def test_gzip_to_prepare(content: bytes, folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(content)
    holds(lambda: list(read_documents(Slice(str(folder / "a.jsonl.gz"), 0, len(content)), "text")), DataError)


@fuzz(bytes_like("one\ntwo é\n".encode()))
def test_text_to_prepare(content: bytes, folder: Path) -> None:
    (folder / "a.txt").write_bytes(content)
    holds(lambda: list(read_documents(Slice(str(folder / "a.txt"), 0, len(content)), "text")), DataError)
