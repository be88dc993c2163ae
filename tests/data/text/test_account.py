"""Test that every file, line and byte that the inputs name is read, or counted with the reason why not."""

import codecs
import gzip
import importlib
import json
import time
from pathlib import Path

import pytest
import zstandard

from data.errors import DataError
from data.prepare import main as prepare
from data.shards.tokenizer import Tokenizer
from data.text.account import DOCUMENTS, NOT_TEXT, READ, SKIPPED, Account, FileAccount
from data.text.documents import read_documents
from data.text.input_files import Slice, find_files, plan_parts
from data.text.recognise import NotText, recognise

GOOD = "".join(f"a good document {number} of plain words\n" for number in range(40))


def texts_of(path: Path, skip: bool = False) -> tuple[list[str], Account]:
    """Return the texts of a file and its account, read as one slice."""
    file = FileAccount(str(path), 0, path.stat().st_size, skip)
    found = [document.text for document in read_documents(Slice(str(path), 0, path.stat().st_size), "text", file)]
    return found, file.close()


def prepared(folder: Path, output: Path, *more: str) -> dict:
    """Prepare a folder with a vocabulary of bytes, and return the report."""
    fixed = ["--vocab-size", "300", "--workers", "1", "--validation-fraction", "0"]
    prepare(["--input", str(folder), "--output", str(output), *fixed, *more])
    return json.loads((output / "report.json").read_text())


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.parametrize("bad", [b"no json\n", b'{"text": "\xff"}\n', b'{"text": 1}\n', b'{"text": "\\ud800"}\n'])
def test_a_bad_line_costs_that_line(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("one") + bad + line("two") + b"\n" + line(""))
    texts, account = texts_of(tmp_path / "a.jsonl", skip=True)
    assert texts == ["one", "two"]
    assert account.total(SKIPPED).num_bytes == len(bad) and account.total(SKIPPED).pieces == 1
    assert account.total().num_bytes == (tmp_path / "a.jsonl").stat().st_size
    assert account.total().files == account.total(READ).files == 1
    with pytest.raises(DataError, match=f"a.jsonl@{len(line('one'))}"):
        texts_of(tmp_path / "a.jsonl")


def test_a_line_above_our_limit_costs_that_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.documents.LARGEST_LINE_BYTES", 100)
    monkeypatch.setattr("data.text.documents.PIECE_BYTES", 64)
    (tmp_path / "a.jsonl").write_bytes(line("one") + line("x" * 1000) + line("two"))
    texts, account = texts_of(tmp_path / "a.jsonl", skip=True)
    assert texts == ["one", "two"]
    assert account.total(SKIPPED).num_bytes == len(line("x" * 1000)) and account.total(SKIPPED).pieces == 1
    with pytest.raises(DataError, match="a line of more than 100 bytes, our limit"):
        texts_of(tmp_path / "a.jsonl")


def test_a_bad_byte_costs_a_piece_of_a_collection(tmp_path: Path) -> None:
    raw = (b"x" * 99 + b"\n") * 4000
    (tmp_path / "a.txt").write_bytes(raw[:200_000] + b"\xff" + raw[200_001:])
    texts, account = texts_of(tmp_path / "a.txt", skip=True)
    lost = account.total(SKIPPED)
    assert lost.pieces == 1 and 64 << 10 <= lost.num_bytes < 66_000
    assert sum(map(len, texts)) + lost.num_bytes == len(raw)


def test_lines_of_lists_alone_are_refused_fast(tmp_path: Path) -> None:
    """They would take 20 times their size in memory; brackets within the text count for nothing."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": [' + b"[]," * 2_000_000 + b'[]], "text": "x"}\n')
    started = time.process_time()
    with pytest.raises(DataError, match="a line with more than 1048576 lists, objects and keys, our limit"):
        texts_of(tmp_path / "a.jsonl")
    assert time.process_time() - started < 1
    text = '[{"\\' * 600_000
    (tmp_path / "b.jsonl").write_bytes(line(text))
    assert texts_of(tmp_path / "b.jsonl")[0] == [text]


def zstd_with_window(log: int, raw: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of a size unknown before
    return compressor.compress(raw) + compressor.flush()


def test_a_large_window_is_read_and_a_limit_of_ours_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd_with_window(28, GOOD.encode()))
    assert texts_of(tmp_path / "a.txt.zst")[0] == [GOOD]
    monkeypatch.setattr("data.text.documents.LARGEST_WINDOW_BYTES", 1 << 27)
    with pytest.raises(DataError, match=r"window is larger than .*our limit"):
        texts_of(tmp_path / "a.txt.zst")


def test_a_small_archive_of_much_text_is_read_fast(tmp_path: Path) -> None:
    """What one step decompresses was copied once for each 64 KiB read of it."""
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x" * (96 << 20)))
    started = time.process_time()
    texts, account = texts_of(tmp_path / "a.txt.zst")
    assert sum(map(len, texts)) == account.total(READ).num_bytes == 96 << 20
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_mark_decides_the_encoding(tmp_path: Path, mark: bytes, encoding: str, name: str) -> None:
    text = "plain words \u00e9 \U0001d11e\n" * 20_000  # so large that a .txt is cut
    content = json.dumps({"text": text}, ensure_ascii=False) if name == "a.jsonl" else text
    raw = mark + content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    texts, account = texts_of(tmp_path / name)
    assert "".join(texts) == text and (len(texts) > 3 or name == "a.jsonl")
    assert account.total(SKIPPED, NOT_TEXT).pieces == 0


def test_a_file_in_utf16_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.input_files._MIN_PART_BYTES", 1000)
    monkeypatch.setattr("data.text.input_files._USUAL_PARTS", 1000)
    for name, encoding in (("a.jsonl", "utf-8-sig"), ("b.jsonl", "utf-16")):
        (tmp_path / name).write_text(line("words " * 100).decode() * 10, encoding)
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    pieces = [piece for part in plan_parts(files, None, Account()) for piece in part]
    assert [piece.path for piece in pieces].count(files[0]) > 3
    assert [piece.path for piece in pieces].count(files[1]) == 1


def test_with_and_without_a_mark_it_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-8-sig"), ("c.txt", "utf-16")):
        (tmp_path / "in" / name).write_text(GOOD, encoding)
    report = prepared(tmp_path / "in", tmp_path / "set")
    assert (report["documents"], report["duplicates"], report["text_bytes"]) == (3, 2, 3 * len(GOOD))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (GOOD.encode("utf-16-le"), "UTF-16LE without"),
        (GOOD.encode("utf-16-be"), "UTF-16BE without"),
        (GOOD.encode("utf-32-le"), "UTF-32LE without"),
        (GOOD.encode("utf-32-be"), "UTF-32BE without"),
        (b"%PDF-1.7\nplain", "a PDF"),
        (b"PK\x03\x04\x14\0\0\0", "a ZIP archive"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (zstandard.compress(b"x"), "Zstandard"),
        (b"PAR1\x15\x04\x15", "Parquet"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG"),
        (bytes(257) + b"ustar\0", "a tar"),
        (bytes(range(256)), "binary data"),
    ],
)
def test_what_is_not_text_is_recognised(head: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotText, match=kind):
        recognise(head)
    (tmp_path / "a.txt").write_bytes(head)
    with pytest.raises(DataError, match=f"a.txt: is {kind}.*; "):
        texts_of(tmp_path / "a.txt")
    texts, account = texts_of(tmp_path / "a.txt", skip=True)
    assert texts == [] and account.total(NOT_TEXT).files == account.total().files == 1
    assert account.total(NOT_TEXT).num_bytes == len(head)


@pytest.mark.parametrize(
    "text", ["a\0b and more plain words", "PK is no archive", "\x1b[1mbold\x1b[0m", "\u4e2d\u6587", "x"]
)
def test_odd_text_is_text(text: str) -> None:
    assert recognise(text.encode()) == ("utf-8", 0)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text(GOOD)
    (tmp_path / "in" / "own").mkdir(parents=True)
    (tmp_path / "in" / "own" / "b.txt").write_text(GOOD)
    (tmp_path / "in" / "another").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "own")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "in" / "own" / "b.txt")
    account = Account()
    found = find_files([str(tmp_path / "in")], ["*.txt"], [], tmp_path / "set", account)
    assert [Path(file).relative_to(tmp_path / "in").as_posix() for file in found] in (
        ["another/a.txt", "c.txt"],
        ["another/a.txt", "own/b.txt"],
    )
    assert account.named == 3 and account.total().files == 1


def test_every_file_named_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "old").mkdir(parents=True)
    (folder / "a.txt").write_text(GOOD)
    (folder / "b.jsonl").write_bytes(line("one") + b"broken\n" + line("two"))
    (folder / "blank.jsonl").write_bytes(b"\n\n")
    (folder / "empty.txt").touch()
    (folder / "notes.md").write_text("five\n")
    (folder / "old" / "c.txt").write_text("old")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(DataError, match=r"--strict: not all files would be read: .*gone.txt.*notes.md"):
        prepared(folder, tmp_path / "set", "--exclude", "old", "--strict")
    inputs = prepared(folder, tmp_path / "set", "--exclude", "old", "--skip-bad-text")["inputs"]
    account = Account.from_json(inputs)
    files = {key: count.files for key, count in account.counts.items() if count.files}
    assert files == {
        (READ, DOCUMENTS): 2,
        (READ, "without text"): 2,
        ("left out", "--exclude"): 1,
        (SKIPPED, "found in a folder, with a name that is no pattern of --include"): 1,
        (SKIPPED, "a link to nothing"): 1,
        (NOT_TEXT, "a PNG picture"): 1,
    }
    assert account.named == 8
    line_lost = account.counts[SKIPPED, "not a JSON object with text"]
    assert (line_lost.files, line_lost.pieces, line_lost.num_bytes) == (0, 1, 7)
    printed = capsys.readouterr().out
    assert "inputs: 8 files named: 4 read, 1 left out, 2 skipped, 1 not text" in printed
    assert "picture.txt: is a PNG picture" in printed


def test_a_byte_that_nobody_counted_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("one") + line("two"))
    count = FileAccount.add
    monkeypatch.setattr(
        FileAccount, "add", lambda self, out, why, size, **more: count(self, out, why, size - 1, **more)
    )
    with pytest.raises(DataError, match=r"of the bytes 0 to 32, 30 are accounted for"):
        texts_of(tmp_path / "a.jsonl")


def test_slices_that_leave_out_bytes_between_them_are_noticed() -> None:
    first, second = FileAccount("a", 0, 10), FileAccount("a", 10, 20)
    first.cover(12)
    second.begin(13)
    with pytest.raises(DataError, match="bytes 12 to 13 were not read once"):
        first.join(second)


def test_a_file_that_nobody_accounted_for_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(name + GOOD)
    module = importlib.import_module("data.text.preparation")
    monkeypatch.setattr(module._FilesOfAPart, "add", lambda self, file: None)
    with pytest.raises(DataError, match="2 files named, 0 accounted for"):
        prepared(tmp_path / "in", tmp_path / "set")


def test_a_file_of_several_parts_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.input_files._MIN_PART_BYTES", 1000)
    monkeypatch.setattr("data.text.input_files._USUAL_PARTS", 1000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(line(f"{number} {GOOD}") for number in range(20)))
    (tmp_path / "in" / "b.txt").write_text(GOOD)
    size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    account = Account.from_json(prepared(tmp_path / "in", tmp_path / "set")["inputs"])
    read = account.counts[READ, DOCUMENTS]
    assert (read.files, read.pieces, read.num_bytes) == (2, 21, size)
    account = Account.from_json(prepared(tmp_path / "in", tmp_path / "some", "--max-megabytes", "0.01")["inputs"])
    assert account.total().files == account.named == 2
    assert 0 < account.total(READ).num_bytes < size


def test_long_lines_teach_the_vocabulary_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(GOOD + "zebra " * 20_000)
    report = prepared(tmp_path / "in", tmp_path / "set")
    tokenizer = Tokenizer(tmp_path / "set" / "tokenizer.model")
    assert any("zebra" in tokenizer.piece(token) for token in range(tokenizer.vocab_size))
    assert report["lines_cut_to_learn_the_vocabulary"] == 1


def test_a_small_validation_split_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} {GOOD}")
    arguments = ["--output", str(tmp_path / "set"), "--vocab-size", "300", "--workers", "1"]
    prepare(["--input", str(tmp_path / "in"), *arguments])
    tokens = json.loads((tmp_path / "set" / "report.json").read_text())["validation"]["tokens"]
    words = f"the validation split has {tokens} tokens, so a run with model.seq_length above {tokens - 1} refuses it"
    assert words in capsys.readouterr().err


def test_progress_is_counted_in_what_a_stage_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(GOOD)
    prepared(tmp_path / "in", tmp_path / "set")
    bars = {bar[:6].strip(): bar for bar in capsys.readouterr().err.replace("\r", "\n").split("\n") if "1/1" in bar}
    assert "step" in bars["merge"] and "shard" in bars["pack"] and "B/s" not in bars["merge"]


def test_a_store_is_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare(["--input", ".", "--output", "s3://bucket/set", "--vocab-size", "300"])
    assert ended.value.code == 2 and "not the address of a store" in capsys.readouterr().err
