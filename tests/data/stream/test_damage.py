"""Test that every kind of damage to shards and manifests is detected."""

import errno
import gzip
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.fetch.transport
from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.inspect import main as inspect
from data.shards.manifest import _fingerprint, load_manifest
from data.stream.token_stream import TokenStream
from tests.data.made import SEQ_LENGTH, first_tokens, make_dataset

SIZES = [40, 40, 40]
SHARD = "train-000001.tar"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", SIZES)


def read_epoch(path: Path, rank: int = 0, ranks: int = 1, on_damage: str = "stop") -> list[int]:
    options = ReadOptions(on_damage=on_damage)
    stream = TokenStream(path, "train", SEQ_LENGTH, 1, rank, ranks, window_shards=2, options=options)
    try:
        return [int(next(stream)[0, 0]) for _ in range(sum(SIZES) // ranks)]
    finally:
        stream.close()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@given(st.integers(0, 10_239), st.sampled_from(["train-000000.tar", SHARD, "train-000002.tar"]))
@settings(max_examples=60, deadline=None)
def test_a_flipped_byte_anywhere_stops_the_run(
    tmp_path_factory: pytest.TempPathFactory, offset: int, name: str
) -> None:
    path = make_dataset(tmp_path_factory.mktemp("data"), SIZES)
    flip(path / name, offset)
    with pytest.raises(DataError, match=rf"{name}: damaged between byte 0 and 16384: digest \w+, expected \w+"):
        read_epoch(path)


def test_a_flip_in_a_large_shard_is_found_where_it_is_and_only_there(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, [20_000])
    flip(path / "train-000000.tar", 200_000)
    stream = TokenStream(path, "train", SEQ_LENGTH, 1, window_shards=1)
    seen = []
    with pytest.raises(DataError, match="between byte 196608 and 212992"):
        while True:
            seen.append(next(stream))
    stream.close()
    assert all(np.array_equal(row, row[:, :1] + np.arange(SEQ_LENGTH + 1)) for row in seen)


@pytest.mark.parametrize("kept", [0, 1, 511, 512, 5000, 9728, 10_239])
def test_truncation_on_a_boundary_or_within_stops_the_run(made: Path, kept: int) -> None:
    os.truncate(made / SHARD, kept)
    with pytest.raises(DataError, match=rf"{SHARD}: has {kept} bytes, expected 10240"):
        read_epoch(made)


def test_a_sound_shard_in_the_place_of_another_stops_the_run(made: Path) -> None:
    shutil.copyfile(made / "train-000000.tar", made / SHARD)
    with pytest.raises(DataError, match=f"{SHARD}: damaged"):
        read_epoch(made)


@pytest.mark.parametrize("action", ["flip", "cut", "remove"])
def test_a_damaged_digest_list_stops_the_run(made: Path, action: str) -> None:
    path = made / "train-000001.digests"
    {"flip": lambda: flip(path, 3), "cut": lambda: os.truncate(path, 8), "remove": path.unlink}[action]()
    with pytest.raises(DataError, match=r"train-000001\.digests"):
        read_epoch(made)


def test_a_shard_that_changes_while_it_is_open_is_checked_again(made: Path) -> None:
    stream = TokenStream(made, "train", SEQ_LENGTH, 40, window_shards=3, prefetch=1)
    next(stream)
    for name in ("train-000000.tar", SHARD, "train-000002.tar"):
        flip(made / name, 700)
    with pytest.raises(DataError, match="damaged"):
        for _ in range(10):
            next(stream)
    stream.close()


def test_skipping_leaves_out_the_whole_shard_on_all_ranks_alike(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(made / SHARD, 800)
    with caplog.at_level(logging.WARNING):
        whole = read_epoch(made, on_damage="skip")
    assert SHARD in caplog.text
    split = [read_epoch(made, rank, 3, "skip") for rank in range(3)]
    assert [split[i % 3][i // 3] for i in range(120)] == whole
    sound = first_tokens(SIZES) - set(range(161, 322))
    assert set(whole) == sound
    assert len(whole) == 120


def test_skipping_decides_before_the_first_sample_of_a_shard_is_used(tmp_path: Path) -> None:
    """A rank that never reads the damaged bytes replaces the shard like the other ranks."""
    path = make_dataset(tmp_path, [6000, 6000])
    flip(path / "train-000001.tar", 90_000)
    stream = TokenStream(path, "train", SEQ_LENGTH, 20, window_shards=2, options=ReadOptions(on_damage="skip"))
    assert next(stream).max() <= 24_000
    stream.close()


@pytest.mark.parametrize("name", [SHARD, "train-000001.digests", "manifest.json", "tokenizer.model"])
@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir])
def test_a_named_pipe_or_a_folder_in_the_place_of_a_file_is_told(
    made: Path, name: str, put: Callable[[Path], None]
) -> None:
    (made / name).unlink()
    put(made / name)
    with pytest.raises(DataError, match=name):
        _ = load_manifest(made).tokenizer_path
        read_epoch(made)


def test_a_named_pipe_that_somebody_writes_to_is_not_waited_for_either(made: Path) -> None:
    (made / "manifest.json").unlink()
    os.mkfifo(made / "manifest.json")
    writer = os.open(made / "manifest.json", os.O_RDWR)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read \(a named pipe\)"):
        load_manifest(made)
    os.close(writer)


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_a_token_beyond_the_vocabulary_stops_the_run_whatever_the_policy(made: Path, on_damage: str) -> None:
    """The largest token is 482. The manifest claims a smaller vocabulary, with a fingerprint that fits."""
    fields = json.loads((made / "manifest.json").read_text())
    for vocab_size in (483, 482):
        fields["vocab_size"] = vocab_size
        (made / "manifest.json").write_text(json.dumps({**fields, "fingerprint": _fingerprint(fields)}))
        if vocab_size == 483:
            assert len(read_epoch(made, on_damage=on_damage)) == 120
    with pytest.raises(DataError, match=r"train-000002\.tar: holds token 482, but the manifest's vocab_size is 482"):
        read_epoch(made, on_damage=on_damage)


def test_damage_in_the_middle_of_a_long_sample_is_found(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, [2], seq_length=20_000)
    flip(path / "train-000000.tar", 40_000)
    stream = TokenStream(path, "train", 20_000, 2)
    with pytest.raises(DataError, match="between byte 32768 and 49152"):
        next(stream)
    stream.close()


def test_skipping_gives_up_when_nothing_is_left(made: Path) -> None:
    for number in range(3):
        flip(made / f"train-{number:06d}.tar", 800)
    with pytest.raises(DataError, match="every shard is damaged"):
        read_epoch(made, on_damage="skip")


def test_skipping_gives_up_when_only_shards_without_a_sample_are_left(tmp_path: Path) -> None:
    path = make_dataset(tmp_path, [10, 0])
    flip(path / "train-000000.tar", 800)
    stream = TokenStream(path, "train", SEQ_LENGTH, 1, options=ReadOptions(on_damage="skip"))
    raised: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except DataError as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert len(raised) == 1 and "every shard is damaged" in str(raised[0])


def trouble(monkeypatch: pytest.MonkeyPatch, call: str, name: str, number: int, times: int) -> None:
    """Make `os.open` or `os.fstat` of the file `name` fail a few times."""
    real, left = getattr(os, call), [times]

    def fail(file: Any, *arguments: Any) -> Any:
        path = file if call == "open" else os.readlink(f"/proc/self/fd/{file}")
        if str(path).endswith(name) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(file, *arguments)

    monkeypatch.setattr(data.fetch.transport, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(f"data.shards.verified_file.os.{call}", fail)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fstat"])
def test_trouble_that_passes_is_no_damage(made: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """The fault concerns one rank, which would otherwise read other samples than the rest."""
    undisturbed = read_epoch(made, on_damage="skip")
    trouble(monkeypatch, call, SHARD, number, times=2)
    assert read_epoch(made, on_damage="skip") == undisturbed


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_trouble_that_lasts_stops_the_run_whatever_the_policy(
    made: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    trouble(monkeypatch, call, SHARD, errno.ESTALE, times=1000)
    with pytest.raises(DataError, match=rf"{SHARD}: could not be read in 5 attempts \(Stale file handle\); check the"):
        read_epoch(made, on_damage="skip")


@pytest.mark.parametrize("kept", [None, 512])
def test_skipping_leaves_out_a_shard_that_is_absent_or_cut(made: Path, kept: int | None) -> None:
    (made / SHARD).unlink() if kept is None else os.truncate(made / SHARD, kept)
    assert set(read_epoch(made, on_damage="skip")) == first_tokens(SIZES) - set(range(161, 322))


def test_verify_names_every_damaged_shard(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(made / SHARD, 9000)
    os.truncate(made / "train-000002.tar", 512)
    with pytest.raises(DataError):
        inspect([str(made), "--verify"])
    printed = capsys.readouterr().out
    assert SHARD in printed and "train-000002.tar" in printed and "train-000000.tar: " not in printed


BOMB = gzip.compress(b" " * 10**7 + b'[0, "a.txt"]\n', mtime=0)
LIST = gzip.compress(b'[0, "a.txt"]\n' * 100, mtime=0)


@pytest.mark.parametrize(
    "content", [b"", b"junk", BOMB, LIST[:-9], LIST[:20] + b"x" + LIST[21:], gzip.compress(b"[0]", mtime=0)]
)
def test_a_damaged_or_exploding_list_of_documents_is_one_clear_line(
    made: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.document_list._MAX_DOCUMENT_LIST_BYTES", 10**6)
    for path in made.glob("*.tar"):
        path.with_suffix(".documents.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"documents\.jsonl\.gz: damaged") as caught:
        inspect([str(made), "--step", "1", "--global-batch-size", "1", "--seq-length", "4"])
    assert "\n" not in str(caught.value)


def test_what_is_printed_cannot_steer_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in made.glob("*.tar"):
        path.with_suffix(".documents.jsonl.gz").write_bytes(gzip.compress(b'[0, "a\\u001b[2J.txt"]\n'))
    inspect([str(made), "--step", "1", "--global-batch-size", "1", "--seq-length", "4"])
    assert "a\\x1b[2J.txt" in capsys.readouterr().out


def edit(path: Path, change: dict) -> None:
    fields = json.loads((path / "manifest.json").read_text())
    fields.update(change)
    (path / "manifest.json").write_text(json.dumps(fields))


def edit_shard(path: Path, change: dict) -> None:
    fields = json.loads((path / "manifest.json").read_text())
    fields["shards"]["train"][1].update(change)
    fields["fingerprint"] = _fingerprint(fields)  # as an attacker would
    (path / "manifest.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "12"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 12}, "fingerprint"),
        ({"end_of_document": -1}, "end_of_document"),
        ({"end_of_document": None}, "end_of_document"),
        ({"end_of_document": True}, "end_of_document"),
        ({"token_dtype": "float64"}, "token_dtype"),
        ({"token_dtype": ["uint16"]}, "token_dtype"),
        ({"content": "code"}, "content"),
        ({"tokenizer_sha256": "../x"}, "tokenizer_sha256"),
        ({"tokenizer_bytes": 1 << 60}, "tokenizer_bytes"),
        ({"text_key": 1}, "text_key"),
        ({"shards": []}, "shards"),
        ({"shards": {"train": []}}, "shards"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"version": 99}, "version"),
        ({"format": "other"}, "format"),
    ],
)
def test_a_changed_manifest_is_refused_by_field(made: Path, change: dict, named: str) -> None:
    edit(made, change)
    with pytest.raises(DataError, match=named) as caught:
        load_manifest(made)
    assert str(made / "manifest.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd.tar"},
        {"name": "/etc/passwd.tar"},
        {"name": "pipe:touch x.tar"},
        {"name": "a;touch x.tar"},
        {"name": ".tar"},
        {"name": 7},
        {"num_tokens": -1},
        {"num_tokens": 1 << 70},
        {"num_tokens": 5000},
        {"num_bytes": 1e300},
        {"num_bytes": 20_480},
        {"sha256": "x"},
        {"digests_sha256": None},
        {"extra": 1},
    ],
)
def test_a_shard_entry_cannot_name_a_command_or_another_place_or_a_huge_size(made: Path, change: dict) -> None:
    edit_shard(made, change)
    with pytest.raises(DataError, match=r"shards\.train\[1\]"):
        load_manifest(made)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(made: Path, content: bytes) -> None:
    (made / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(made)


def test_a_missing_dataset_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/manifest\.json: cannot be read \(No such file"):
        load_manifest(tmp_path / "absent")


def test_another_tokenizer_in_its_place_is_refused(made: Path) -> None:
    (made / "tokenizer.model").write_bytes(b"nine")
    with pytest.raises(DataError, match=r"tokenizer\.model: sha256"):
        _ = load_manifest(made).tokenizer_path
