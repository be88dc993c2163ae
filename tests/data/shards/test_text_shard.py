"""Compare indexed shards of text, written by webdataset, with tokenizing their text at once."""

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.index import _ranges
from data.index import main as index
from data.inspect import main as inspect
from data.shards.manifest import _fingerprint, load_manifest
from data.shards.tar_layout import CHUNK_BYTES, DIGEST_BYTES
from data.shards.text_index import IndexJob, documents_in
from data.shards.text_shard import TextShard
from data.shards.tokenizer import Tokenizer, train_tokenizer
from data.stream.samples import open_shard
from data.stream.token_stream import TokenStream

WORDS = ["red", "green", "blue", "été", "▁", "tab\t"]


def text_of(number: int) -> str:
    words = random.Random(number)
    return "\n".join(" ".join(words.choices(WORDS, k=9)) for _ in range(number % 7))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three shards with webdataset's writer: .txt and .json members in turn, and members that are not text."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"web-{shard:02d}.tar")) as writer:
            for number in range(shard * 30, shard * 30 + 30):
                body = {"json": {"text": text_of(number)}} if number % 2 else {"txt": text_of(number)}
                writer.write({"__key__": f"{number:04d}", "cls": number, **body})
    (folder / "tokenizer.model").write_bytes(train_tokenizer(text_of(6).split("\n") * 20 + WORDS, 300))
    return folder


@pytest.fixture
def indexed(shards: Path, tmp_path: Path) -> Path:
    run(shards, tmp_path / "set")
    return tmp_path / "set"


def run(shards: Path, output: Path, address: str = "", train: str = "web-0[01].tar") -> None:
    arguments = ["--address", address or str(shards), "--train", train, "--validation", "web-02.tar", "--workers", "1"]
    index([*arguments, "--tokenizer", str(shards / "tokenizer.model"), "--output", str(output)])


def tokens_of(shards: Path, numbers: range) -> list[int]:
    tokenizer = Tokenizer(shards / "tokenizer.model")
    return [token for number in numbers for token in [*tokenizer.encode(text_of(number)), tokenizer.end_of_document]]


@pytest.mark.parametrize("seq_length", [1, 7, 64])
def test_samples_are_those_of_the_text_tokenized_in_one_go(shards: Path, indexed: Path, seq_length: int) -> None:
    stream = TokenStream(indexed, "train", seq_length, 1)
    number = stream.manifest.num_samples("train", seq_length)
    seen = sorted(tuple(next(stream)[0].tolist()) for _ in range(number))
    stream.close()
    expected = []
    for numbers in (range(30), range(30, 60)):
        tokens = tokens_of(shards, numbers)
        count = (len(tokens) - 1) // seq_length
        expected += [tuple(tokens[i * seq_length : (i + 1) * seq_length + 1]) for i in range(count)]
    assert seen == sorted(expected)


def test_any_number_of_ranks_sees_the_same(indexed: Path) -> None:
    whole = TokenStream(indexed, "train", 16, 6)
    halves = [TokenStream(indexed, "train", 16, 3, rank, 2) for rank in range(2)]
    for _ in range(5):
        assert np.array_equal(next(whole), np.concatenate([next(half) for half in halves]))
    for stream in (whole, *halves):
        stream.close()


def test_shards_from_afar(shards: Path, indexed: Path, tmp_path: Path) -> None:
    address = f"pipe:cat {shards}/{{}}"
    run(shards, tmp_path / "far", address, "web-{00..01}.tar")
    assert load_manifest(tmp_path / "far").fingerprint == load_manifest(indexed).fingerprint
    assert not list((tmp_path / "far").glob("*.tar"))
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"datasets": [{"path": "far", "shards": address}]}))
    allowed = ReadOptions(allow_commands=True)
    far = TokenStream(mixture, "validation", 16, 4, options=allowed)
    near = TokenStream(indexed, "validation", 16, 4)
    for one, other in zip(far, near, strict=True):
        assert np.array_equal(one, other)


def test_a_flipped_byte_in_the_text_stops_the_run(shards: Path, indexed: Path) -> None:
    link = indexed / "web-00.tar"
    content = bytearray(link.read_bytes())
    link.unlink()
    content[content.index(b"green")] ^= 1
    link.write_bytes(content)
    stream = TokenStream(indexed, "train", 16, 8)
    with pytest.raises(DataError, match=r"web-00\.tar: damaged between byte"):
        for _ in range(20):
            next(stream)
    stream.close()
    with pytest.raises(DataError, match="1 of 3 shards are damaged"):
        inspect([str(indexed), "--verify"])


def test_a_sample_is_traced_to_its_documents(shards: Path, indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(indexed), "--sample", "5", "--seq-length", "16"])
    first, _, text = capsys.readouterr().out.partition("\n")
    offsets = {int(part.rstrip(",")) for part in first.split() if part.rstrip(",").isdigit()}
    with tarfile.open(first.split()[2]) as archive:
        numbers = [int(m.name[:4]) for m in archive if m.offset_data in offsets and not m.name.endswith("cls")]
    assert numbers and text.rstrip("\n") in "".join(map(text_of, numbers))


def tar_of(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, body in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda whole: whole[:1024] + b"\xff" * 512 + whole[1536:],
            "yet not the end|not a plain tar",
        ),
        (lambda whole: whole[:700], "cut short|not a plain tar"),
        (lambda whole: whole[:1024], "does not end as a tar"),
        (lambda whole: b"\x1f\x8b" + whole, "not a plain tar"),
        (lambda whole: whole.replace(b"first", b"fir\xfft"), "a.txt.: not text"),
        (lambda whole: whole.replace(b"a.txt", b"a.dat").replace(b"b.txt", b"b.dat"), "not a plain tar"),
    ],
)
def test_a_bad_shard_cannot_be_indexed(shards: Path, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    whole = tar_of(tmp_path / "bad.tar", {"a.txt": b"first", "b.txt": b"second"})
    (tmp_path / "bad.tar").write_bytes(damage(whole))
    with pytest.raises(DataError, match=message) as caught:
        index(
            [
                "--address",
                str(tmp_path),
                "--train",
                "bad.tar",
                "--tokenizer",
                str(shards / "tokenizer.model"),
                "--output",
                str(tmp_path / "set"),
                "--workers",
                "1",
            ]
        )
    assert "bad.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_the_text_of_a_sample_is_counted_once(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples with a picture, a text, and the same text in a .json."""
    members = {}
    for number in range(3):
        text = f"text {number} {text_of(5)}"
        body = json.dumps({"text": text}).encode()
        members |= {f"{number}.jpg": b"pixels", f"{number}.json": body, f"{number}.txt": text.encode()}
    tar_of(tmp_path / "a.tar", members)
    fixed = ["--address", str(tmp_path), "--train", "a.tar", "--tokenizer", str(shards / "tokenizer.model")]
    fixed += ["--workers", "1", "--output"]
    with pytest.raises(
        DataError, match=r"a\.tar: sample '0' has both a \.json and a \.txt member; .*--text-member txt"
    ):
        index([*fixed, str(tmp_path / "both")])
    for extension in ("txt", "json"):
        index([*fixed, str(tmp_path / extension), "--text-member", extension])
        assert f"3 .jpg, 3 .{'json' if extension == 'txt' else 'txt'}" in capsys.readouterr().out
    tokens = [load_manifest(tmp_path / extension).num_tokens("train") for extension in ("txt", "json")]
    tokenizer = Tokenizer(shards / "tokenizer.model")
    assert tokens == [sum(len(tokenizer.encode(f"text {number} {text_of(5)}")) + 1 for number in range(3))] * 2
    with pytest.raises(DataError, match=r"holds no \.caption\.txt member with text, 3 \.jpg, "):
        index([*fixed, str(tmp_path / "none"), "--text-member", "caption.txt"])
    with pytest.raises(DataError, match="--text-member cls: expected"):
        index([*fixed, str(tmp_path / "none"), "--text-member", "cls"])


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


NESTED = b"[" * 200_000


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (member("a.txt", 1 << 32), "4294967296 bytes, a document may have"),
        (member("a", 1 << 32, tarfile.XHDTYPE), "a header of 4294967296 bytes"),
        (member("a", 1 << 32, tarfile.GNUTYPE_LONGNAME), "a header of 4294967296 bytes"),
        (member("a.json", len(NESTED)) + NESTED, "nested too deeply"),
    ],
)
def test_a_shard_cannot_exhaust_memory(shards: Path, tmp_path: Path, start: bytes, message: str) -> None:
    with (tmp_path / "web-00.tar").open("wb") as file:
        file.write(start)
        file.truncate((1 << 32) + 20_480)  # a sparse file, which takes no space on the disk
    job = IndexJob(str(tmp_path), "web-00.tar", tmp_path, shards / "tokenizer.model", "text")
    with pytest.raises(DataError, match=message):
        list(documents_in(job, tmp_path / "web-00.tar", Tokenizer(job.tokenizer)))


def lie(indexed: Path, row: int | slice, column: int, value: int) -> None:
    """Change every index and all digests with it, as an attacker would."""
    manifest = json.loads((indexed / "manifest.json").read_text())
    for shard in manifest["shards"]["train"]:
        sidecar = indexed / shard["name"].replace(".tar", ".digests")
        content, digests = sidecar.read_bytes(), -(-shard["num_bytes"] // CHUNK_BYTES) * DIGEST_BYTES
        documents = np.frombuffer(content, dtype="<i8", offset=digests).reshape(-1, 4).copy()
        documents[row, column] = value
        sidecar.write_bytes(content[:digests] + documents.tobytes())
        shard["digests_sha256"] = hashlib.sha256(sidecar.read_bytes()).hexdigest()
    manifest["fingerprint"] = _fingerprint(manifest)
    (indexed / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [(0, 0, -1), (0, 0, 1 << 62), (3, 1, 1 << 62), (3, 1, -1), (0, 2, 1 << 62), (0, 2, -(1 << 62)), (0, 2, 0)],
)
def test_an_index_that_lies_is_refused(indexed: Path, row: int, column: int, value: int) -> None:
    lie(indexed, row, column, value)
    stream = TokenStream(indexed, "train", 16, 8)
    with pytest.raises(DataError, match="lists documents that the shard cannot hold"):
        next(stream)
    stream.close()


@pytest.mark.parametrize(("column", "value"), [(3, 1), (3, 0), (0, 0)])
def test_an_index_that_disagrees_with_the_text_stops_the_run_whatever_the_policy(
    indexed: Path, column: int, value: int
) -> None:
    """The shard itself is sound, so on_damage may not leave it out on one rank alone."""
    lie(indexed, slice(1, 20), column, value)
    stream = TokenStream(indexed, "train", 16, 8, options=ReadOptions(on_damage="skip"))
    with pytest.raises(DataError, match=r"the document at byte \d+ (is not text|makes).*index the shards again"):
        for _ in range(10):
            next(stream)
    stream.close()


def test_the_tokens_kept_of_a_text_shard_are_bounded(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.text_shard._KEPT_TOKENS", 300)
    manifest = load_manifest(indexed)
    shard = open_shard(manifest, manifest.shards["train"][0])
    whole = shard.rows(np.arange(0, 640, 16), 17)
    again = shard.rows(np.arange(0, 640, 16)[::-1], 17)[::-1]
    assert np.array_equal(whole, again)
    assert isinstance(shard, TextShard) and sum(map(len, shard._kept.values())) == shard._num_kept <= 300


def test_names_that_match_nothing_are_told(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such shard"):
        run(shards, tmp_path / "set", train="other-*.tar")


@pytest.mark.parametrize("names", ["web-{0..9999999999}.tar", "web-{9..0}.tar", "{0..99999}-{0..99999}.tar"])
def test_a_range_that_no_dataset_has_is_told_at_once(shards: Path, tmp_path: Path, names: str) -> None:
    with pytest.raises(DataError, match="expected 1 to 100000; correct the range"):
        run(shards, tmp_path / "set", train=names)


def test_globs_that_find_more_shards_than_a_manifest_holds_are_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.index.MAX_SHARDS", 2)
    with pytest.raises(DataError, match="3 shards, a dataset has at most 2"):
        run(shards, tmp_path / "set")


def die(job: object) -> None:
    os._exit(9)


def test_a_worker_that_is_killed_is_told(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.index.index_shard", die)
    with pytest.raises(DataError, match="a worker was killed, perhaps for memory"):
        run(shards, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_ranges_multiply_and_keep_their_width() -> None:
    assert _ranges("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert _ranges("{0..1}x{7..8}") == ["0x7", "0x8", "1x7", "1x8"]
    assert _ranges("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("name", ["sub/d.tar", "../web-02.tar", "a b.tar", "\u00e9.tar", "web.tgz"])
def test_a_name_that_no_manifest_may_hold_is_told_before_anything_is_written(
    shards: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "folder"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shards / "web-02.tar", folder / name)
    with pytest.raises(DataError, match="not a plain file name ending in"):
        index([*to(shards, folder, tmp_path / "set"), "--train", name])
    with pytest.raises(DataError, match="not a plain file name ending in"):
        index([*to(shards, f"pipe:cat {folder}/{{}}", tmp_path / "set"), "--train", name])
    assert not (tmp_path / "set").exists()


def to(shards: Path, address: object, output: Path) -> list[str]:
    tokenizer = str(shards / "tokenizer.model")
    return ["--address", str(address), "--tokenizer", tokenizer, "--output", str(output), "--workers", "1"]


def test_a_shard_is_in_one_split_and_once(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"web-02\.tar is named twice"):
        run(shards, tmp_path / "set", train="web-*.tar")


def test_indexing_into_the_folder_of_the_shards_leaves_them_as_they_are(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    run(folder, folder)
    for name in ("web-00.tar", "web-01.tar", "web-02.tar"):
        assert (folder / name).read_bytes() == (shards / name).read_bytes() and not (folder / name).is_symlink()
    inspect([str(folder), "--verify"])


def test_no_file_of_others_is_replaced(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "web-00.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match="another file is where the link"):
        run(shards, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"mine too")
    with pytest.raises(DataError, match="is a different tokenizer"):
        run(shards, tmp_path)
    assert (tmp_path / "web-00.tar").read_bytes() == b"mine"
    assert (tmp_path / "tokenizer.model").read_bytes() == b"mine too"
