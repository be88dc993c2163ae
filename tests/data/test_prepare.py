"""Compare prepared datasets with their text: nothing lost, nothing twice, the same bytes however they were made."""

import gzip
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset
import zstandard
from numpy import array, frombuffer

from data.errors import DataError
from data.inspect import first_sample_of
from data.inspect import main as inspect
from data.prepare import main as prepare
from data.shards.document_list import documents_of
from data.shards.manifest import load_manifest
from data.shards.tokenizer import Tokenizer
from data.stream.samples import open_shard
from data.stream.token_stream import TokenStream
from data.text.account import Account
from data.text.encoded_part import document_starts_in
from data.text.input_files import find_files

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def text_of(number: int) -> str:
    words = random.Random(number)
    return f"document {number}\n" + " ".join(words.choice(WORDS) for _ in range(60)) + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 400 documents in files of every kind, 20 of them twice, and an empty file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep" / "site-packages").mkdir(parents=True)
    for number in range(50):
        (folder / "deep" / f"{number}.py").write_text(text_of(number))
    (folder / "deep" / "site-packages" / "not.py").write_text("never")
    (folder / "deep" / "notes.md").write_text("never")
    (folder / "empty.txt").write_text("")
    lines = [json.dumps({"text": text_of(number), "id": number}) + "\n" for number in range(400)]
    (folder / "a.jsonl").write_text("".join(lines[50:200]) + "\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[180:300]).encode()))
    frames = ["".join(lines[300:350]), "".join(lines[350:400])]
    (folder / "c.jsonl.zst").write_bytes(b"".join(zstandard.compress(frame.encode()) for frame in frames))
    return folder


def run(corpus: Path, output: Path, *more: str) -> Path:
    fixed = ["--exclude", "site-packages", "--vocab-size", "400", "--validation-fraction", "0.1"]
    prepare(["--input", str(corpus), "--output", str(output), *fixed, *more])
    return output


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(corpus, tmp_path_factory.mktemp("prepared") / "set", "--workers", "1")


def digest_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows(folder: Path) -> dict[tuple[str, str], dict]:
    """Return the counts of a report's account of the inputs, by outcome and reason."""
    counts = json.loads((folder / "report.json").read_text())["inputs"]["counts"]
    return {(row["outcome"], row["reason"]): row for row in counts}


def documents(folder: Path, split: str) -> list[str]:
    """Return the documents that webdataset and the tokenizer read from the shards."""
    manifest = load_manifest(folder)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    urls = [str(folder / shard.name) for shard in manifest.shards[split]]
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    tokens = frombuffer(b"".join(sample["tokens"] for sample in samples), dtype=manifest.token_dtype).tolist()
    texts, begin = [], 0
    for place, token in enumerate(tokens):
        if token == tokenizer.end_of_document:
            texts.append(tokenizer.decode(tokens[begin:place]))
            begin = place + 1
    assert begin == len(tokens)
    return texts


def test_every_document_is_there_once_and_in_one_split(prepared: Path) -> None:
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert sorted(train + validation) == sorted(map(text_of, range(400)))
    assert 15 <= len(validation) <= 70


def test_the_stream_reads_what_webdataset_reads(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    stream = TokenStream(prepared, "validation", 16, 3)
    rows = [row for batch in stream for row in batch[: stream.valid_rows]]
    text = Tokenizer(manifest.tokenizer_path).decode([token for row in rows for token in row[:-1]])
    assert "".join(documents(prepared, "validation")).startswith(text)
    assert len(rows) == (manifest.num_tokens("validation") - 1) // 16


def test_the_report_counts(prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    manifest = load_manifest(prepared)
    assert report["documents"] == 420 and report["duplicates"] == 20
    for split in ("train", "validation"):
        texts = documents(prepared, split)
        assert report[split]["documents"] == len(texts)
        assert report[split]["characters"] == sum(map(len, texts))
        assert report[split]["tokens"] == manifest.num_tokens(split)


@pytest.mark.parametrize("more", [["--workers", "2"], ["--workers", "1"]])
def test_the_bytes_do_not_depend_on_workers(
    corpus: Path, prepared: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test several small parts, and one large part."""
    assert digest_of(run(corpus, tmp_path / "set", *more)) == digest_of(prepared)


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text.input_files._MIN_PART_BYTES", 4 << 10)
    monkeypatch.setattr("data.text.input_files._USUAL_PARTS", 1000)


def test_parts_and_buckets_change_nothing(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    monkeypatch.setattr("data.text.duplicates._BUCKET_DOCUMENTS", 50)
    run(corpus, tmp_path / "set", "--workers", "1")
    for split in ("train", "validation"):
        assert documents(tmp_path / "set", split) == documents(prepared, split)


def test_stages_of_several_tasks_give_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_parts(monkeypatch)
    more = ["--workers", "1", "--shard-megabytes", "0.01"]
    run(corpus, tmp_path / "one", *more)
    for stage in ("scan", "merge", "encode", "pack", "finish"):
        for task in range(3):
            run(corpus, tmp_path / "many", *more, "--stage", stage, "--task", f"{task}/3")
    assert len(list((tmp_path / "one").glob("train-*.tar"))) > 2
    assert digest_of(tmp_path / "many") == digest_of(tmp_path / "one")


def test_a_stage_before_its_time_is_one_clear_line(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--stage scan first"):
        run(corpus, tmp_path / "set", "--stage", "merge")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on_and_gives_the_same(
    corpus: Path, prepared: Path, tmp_path: Path, seed: int
) -> None:
    command = [sys.executable, "-m", "data.prepare", "--input", str(corpus), "--output", str(tmp_path / "set")]
    command += ["--exclude", "site-packages", "--vocab-size", "400", "--validation-fraction", "0.1", "--workers", "1"]
    moments = random.Random(seed)
    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(corpus, tmp_path / "set", "--workers", "1")
    assert digest_of(tmp_path / "set") == digest_of(prepared)


def test_finished_jobs_are_not_done_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(corpus, tmp_path / "set", "--stage", "scan")
    monkeypatch.setitem(importlib.import_module("data.text.preparation")._STAGES, "scan", None)
    run(corpus, tmp_path / "set")
    load_manifest(tmp_path / "set")


def test_run_again_it_says_so_and_touches_nothing(
    corpus: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    (prepared / ".work" / "scan").mkdir(parents=True)  # left by a process killed at the very end
    run(corpus, prepared)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_the_output_is_no_input_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output lies in the input folder, as when its preparation is resumed."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(text_of(number))
    for _ in range(2):
        prepare(["--input", str(tmp_path), "--output", str(tmp_path / "set"), "--vocab-size", "320", "--workers", "1"])
    assert "already prepared" in capsys.readouterr().out


def test_files_come_folder_by_folder_whatever_their_names(tmp_path: Path) -> None:
    for name in ("a/z.txt", "a-b.txt", "a.b/z.txt", "a/b/z.txt", "A/z.txt", "a b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = [str(path) for path in sorted(tmp_path.rglob("*.txt"))]
    assert find_files([str(tmp_path), f"{tmp_path}/a"], ["*.txt"], [], tmp_path / "set", Account()) == expected


def test_file_names_that_are_no_text_are_names_too(tmp_path: Path) -> None:
    for number in range(3):
        Path(tmp_path, os.fsdecode(b"\xff%d.txt" % number)).write_text(text_of(number))
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "set"), "--vocab-size", "320", "--workers", "1"]
    prepare([*arguments, "--max-megabytes", "1"])
    assert sorted(documents(tmp_path / "set", "train") + documents(tmp_path / "set", "validation")) == sorted(
        map(text_of, range(3))
    )
    inspect([str(tmp_path / "set"), "--sample", "0", "--seq-length", "16"])


def test_more_shards_than_a_manifest_holds_are_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.text.preparation.MAX_SHARDS", 2)
    with pytest.raises(DataError, match="the train split would have 5 shards, at most 2; raise --shard-megabytes"):
        run(corpus, tmp_path / "set", "--workers", "1", "--shard-megabytes", "0.01")


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="is not a plain file, and input is read more than once"):
        prepare(["--input", str(tmp_path / "pipe.txt"), "--output", str(tmp_path / "set"), "--vocab-size", "320"])


def test_other_settings_do_not_replace_a_dataset_unless_told(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "set", "--workers", "1")
    fingerprint = load_manifest(tmp_path / "set").fingerprint
    with pytest.raises(DataError, match="--overwrite"):
        run(corpus, tmp_path / "set", "--text-key", "body")
    assert load_manifest(tmp_path / "set").fingerprint == fingerprint
    run(corpus, tmp_path / "set", "--workers", "1", "--overwrite", "--shard-megabytes", "0.01")
    assert load_manifest(tmp_path / "set").fingerprint != fingerprint


def test_a_tokenizer_can_be_used_again(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    arguments = ["--input", str(corpus / "a.jsonl"), "--output", str(tmp_path / "set")]
    prepare([*arguments, "--tokenizer", str(prepared / "tokenizer.model"), "--workers", "1"])
    assert load_manifest(tmp_path / "set").tokenizer_sha256 == load_manifest(prepared).tokenizer_sha256
    assert sorted(documents(tmp_path / "set", "train") + documents(tmp_path / "set", "validation")) == sorted(
        map(text_of, range(50, 200))
    )


def test_a_large_text_file_is_cut_at_line_ends_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut across slices, with lines longer than a piece and four-byte characters at the cuts."""
    monkeypatch.setattr("data.text.input_files._MIN_PART_BYTES", 100_000)
    monkeypatch.setattr("data.text.input_files._USUAL_PARTS", 1000)
    chunks = random.Random(1)
    text = "".join(f"line {i} \U0001d11e\n" for i in range(20_000))
    text += "".join(chunks.choice("ab\u00e9\u2581\U0001d11e") for _ in range(120_000)) + "\nand the end"
    (tmp_path / "large.txt").write_text(text)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress((text + "!").encode()))
    for name, whole in (("large.txt", text), ("large.txt.gz", text + "!")):
        output = tmp_path / f"{name}.set"
        prepare(
            [
                "--input",
                str(tmp_path / name),
                "--output",
                str(output),
                "--vocab-size",
                "400",
                "--workers",
                "1",
                "--validation-fraction",
                "0",
            ]
        )
        assert "".join(documents(output, "train")) == whole
        assert len(documents(output, "train")) > 4


def test_a_small_corpus_still_has_a_validation_document(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text_of(number) * 3)
    prepare(["--input", str(tmp_path), "--output", str(tmp_path / "set"), "--vocab-size", "330", "--workers", "1"])
    assert len(documents(tmp_path / "set", "validation")) == 1


def test_whole_projects_are_held_out(tmp_path: Path) -> None:
    for project in ("apple-1", "book-2", "cedar-3"):
        (tmp_path / "in" / project).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "in" / project / f"{number}.txt").write_text(project + text_of(number) * 3)
    fixed = ["--input", str(tmp_path / "in"), "--vocab-size", "330", "--workers", "1", "--output"]
    prepare([*fixed, str(tmp_path / "set"), "--hold-out", "b*", "cedar-?"])
    assert {text[:5] for text in documents(tmp_path / "set", "train")} == {"apple"}
    assert {text[:5] for text in documents(tmp_path / "set", "validation")} == {"book-", "cedar"}
    assert len(documents(tmp_path / "set", "validation")) == 8

    for more, words in (
        (["x*"], "none of the input files match"),
        (["*-?"], "all of the input files match"),
        (["b*", "--validation-fraction", "0.1"], "either --hold-out"),
    ):
        with pytest.raises(DataError, match=words):
            prepare([*fixed, str(tmp_path / "other"), "--hold-out", *more])


def test_a_step_is_traced_to_its_documents(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(corpus, tmp_path / "set", "--workers", "1", "--shard-megabytes", "0.01")
    stream = TokenStream(output, "train", 32, 4, seed=3)
    tokenizer = Tokenizer(load_manifest(output).tokenizer_path)
    rows = [tokenizer.decode(row) for _ in range(5) for row in next(stream)]
    stream.close()
    capsys.readouterr()
    inspect([str(output), "--step", "5", "--global-batch-size", "4", "--seq-length", "32", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line, text, number in zip(lines, rows[16:], range(16, 20), strict=True):
        assert line.startswith(f"sample {number}: ")
        sources = line.rpartition(": ")[2].split(", ")
        together = "".join(document_at(source) for source in sources)
        assert text in together
    inspect([str(output), "--sample", "17", "--seq-length", "32", "--seed", "3"])
    assert rows[17] in capsys.readouterr().out


def test_a_run_that_went_back_is_traced_by_its_journal(tmp_path: Path) -> None:
    """The run rolls back from step 9 to 4 and skips samples, is killed before the next save, then rolls back to 0."""
    assert first_sample_of(7, 8, None) == first_sample_of(7, 8, tmp_path) == 48
    journal = tmp_path / "journal.jsonl"
    back = {"event": "rolled back", "step": 4, "next_sample": 80}
    journal.write_text(json.dumps({"event": "saved", "step": 4}) + "\n" + json.dumps(back) + '\n{"event": "ro')
    assert [first_sample_of(step, 8, tmp_path) for step in (4, 5, 7)] == [24, 80, 96]
    journal.write_text(journal.read_text() + "\n" + json.dumps({"event": "resumed", "step": 6}) + "\n")
    assert [first_sample_of(step, 8, tmp_path) for step in (4, 5, 7)] == [24, 80, 96]
    journal.write_text(journal.read_text() + json.dumps({"event": "resumed", "step": 4}) + "\n")
    assert [first_sample_of(step, 8, tmp_path) for step in (4, 5, 7)] == [24, 32, 48]
    journal.write_text(journal.read_text() + json.dumps({**back, "step": 0, "next_sample": 200}) + "\n")
    assert [first_sample_of(step, 8, tmp_path) for step in (1, 4)] == [200, 224]


@pytest.mark.parametrize(
    "length", [{"train_steps": 2, "train_tokens": None}, {"train_steps": None, "train_tokens": 65}]
)
def test_a_step_that_the_run_never_takes_is_refused(
    prepared: Path, tmp_path: Path, length: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"global_batch_size": 2, "seed": 0, **length}
    config = {"data": {"path": str(prepared)}, "model": {"seq_length": 32}, "training": training}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    inspect(["--run", str(tmp_path), "--step", "2"])
    assert capsys.readouterr().out.startswith("sample 2: ")
    with pytest.raises(DataError, match=r"--step 3: .* ends at step 2; name a step from 1 to that"):
        inspect(["--run", str(tmp_path), "--step", "3"])


def test_a_sample_past_the_end_of_validation_is_refused(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = load_manifest(prepared).num_samples("validation", 16)
    arguments = [str(prepared), "--seq-length", "16", "--split", "validation"]
    inspect([*arguments, "--global-batch-size", str(count - 1), "--step", "2"])
    assert capsys.readouterr().out.startswith(f"sample {count - 1}: ")
    with pytest.raises(DataError, match=f"holds {count} samples of seq_length 16, counted from 0"):
        inspect([*arguments, "--sample", str(count)])


def test_a_document_that_runs_into_the_next_shard_is_listed_there_too(corpus: Path, tmp_path: Path) -> None:
    manifest = load_manifest(run(corpus, tmp_path / "set", "--workers", "1", "--shard-megabytes", "0.01"))
    tokenizer = Tokenizer(manifest.tokenizer_path)
    assert len(manifest.shards["train"]) > 2
    for shard in manifest.shards["train"]:
        (source,) = documents_of(manifest, shard, 0, 1)
        (row,) = open_shard(manifest, shard).rows(array([0]), 4)
        assert tokenizer.decode(row).split("\n")[0] in document_at(source)


def document_at(source: str) -> str:
    """Return the document that a source names, read without this project's code."""
    path, _, offset = source.partition("@")
    if not offset:
        return Path(path).read_text()
    raw = Path(path).read_bytes()
    if path.endswith(".gz"):
        raw = gzip.decompress(raw)
    if path.endswith(".zst"):
        raw = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
    return json.loads(raw[int(offset) :].split(b"\n")[0])["text"]


def test_every_document_is_listed_by_each_shard_that_holds_of_it(corpus: Path, tmp_path: Path) -> None:
    """Find the documents again from the end-of-document tokens, across shards and parts."""
    manifest = load_manifest(run(corpus, tmp_path / "set", "--workers", "1", "--shard-megabytes", "0.01"))
    begun, first = 0, 0  # first token of the current document, of the shard
    for shard in manifest.shards["train"]:
        tokens = open_shard(manifest, shard).rows(array([0]), shard.num_tokens)[0]
        ends = (tokens == manifest.end_of_document).nonzero()[0] + 1
        listed = gzip.decompress((tmp_path / "set" / shard.name).with_suffix(".documents.jsonl.gz").read_bytes())
        expected = [begun, *(first + int(end) for end in ends if end < shard.num_tokens)]
        assert [first + json.loads(line)[0] for line in listed.splitlines()] == expected
        begun = first + int(ends[-1]) if ends.size else begun
        first += shard.num_tokens


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (100, 130, [(0, "a"), (10, "b"), (20, "c")]),
        (110, 120, [(0, "b")]),
        (109, 121, [(-9, "a"), (1, "b"), (11, "c")]),
        (125, 200, [(-5, "c")]),
        (50, 101, [(50, "a")]),
    ],
)
def test_documents_at_the_edges_of_a_shard(
    tmp_path: Path, first: int, last: int, expected: list[tuple[int, str]]
) -> None:
    """The part begins at token 100 and holds three documents of 10 tokens."""
    (tmp_path / "documents").write_text('[0, "a"]\n[10, "b"]\n[20, "c"]\n')
    assert list(document_starts_in(tmp_path / "documents", 100, first, last)) == expected


def broken(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


CUT_GZIP = gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0)[:-20]
CUT_ZSTD = zstandard.compress(random.Random(0).randbytes(100_000).hex().encode())[:-50_000]  # the same in each process


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"abc \xff def", r"a\.txt: not UTF-8 at byte 4 \(0xff\)"),
        ("a.txt", b"x" * 300_000 + b"\n\xe2\x82\n", "not UTF-8 at byte 300001"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', r"a\.jsonl@14: .*int"),
        ("a.jsonl", b'{"body": "a"}\n', "--text-key"),
        ("a.jsonl", b"no json\n", "not a JSON object"),
        ("a.jsonl", b'["text"]\n', "not a JSON object"),
        ("a.jsonl", b"[" * 200_000, "not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.jsonl.gz", CUT_GZIP, r"a\.jsonl\.gz: the archive is damaged"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: the archive is damaged"),
        ("a.txt.zst", CUT_ZSTD, r"a\.txt\.zst: the archive is damaged"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst: the archive is damaged"),
        ("a.txt", b"only one", "single document"),
        ("a.txt", b"ab " * 90_000, "--vocab-size 4000"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = broken(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(["--input", path, "--output", str(tmp_path / "set"), "--vocab-size", "4000", "--workers", "1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.txt", "--vocab-size", "300"], "no such file"),
        (["--input", "absent-*.txt", "--vocab-size", "300"], "matches nothing"),
        (["--input", "{corpus}"], "--vocab-size N"),
        (["--input", "", "--vocab-size", "300"], "unset variable"),
        (["--input", "{corpus}", "--vocab-size", "300", "--tokenizer", "x"], "--tokenizer FILE"),
        (["--input", "{corpus}", "--tokenizer", "absent"], "cannot read the tokenizer"),
        (["--input", "{corpus}", "--vocab-size", "300", "--include", "*.rs"], "no file matches"),
        (
            ["--input", "{corpus}", "--vocab-size", "300", "--tokenizer-megabytes", "1e-6"],
            "--tokenizer-megabytes 1e-06",
        ),
        (["--input", "{corpus}", "--vocab-size", "300", "--stage", "scan", "--task", "3/3"], "--task 3/3"),
        (["--input", "{corpus}", "--vocab-size", "300", "--stage", "scan", "--task", "\u00b2/3"], "--task \u00b2/3"),
    ],
)
def test_bad_arguments_are_one_clear_line(corpus: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    filled = [argument.replace("{corpus}", str(corpus)) for argument in arguments]
    with pytest.raises(DataError, match=message):
        prepare([*filled, "--output", str(tmp_path / "set"), "--workers", "1"])


def test_the_command_prints_one_line_and_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.prepare", "--input", "absent", "--output", tmp_path, "--vocab-size", "999"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: absent: no such file") and done.stderr.count("\n") == 1


def test_a_name_that_the_terminal_cannot_show_is_spelled(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    folder = Path(tmp_path, os.fsdecode(b"\xffset"))
    folder.symlink_to(prepared)
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--input",
        corpus,
        "--exclude",
        "site-packages",
        "--output",
        folder,
    ]
    command += ["--vocab-size", "400", "--validation-fraction", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and f"{tmp_path}/\\udcffset: already prepared" in done.stdout, done.stderr


def test_bad_files_can_be_left_out_and_are_reported(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(text_of(number))
    broken(tmp_path, "bad.txt", b"\xff")
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "set"), "--vocab-size", "320", "--workers", "1"]
    with pytest.raises(DataError, match="--skip-bad-text"):
        prepare(arguments)
    prepare([*arguments, "--skip-bad-text", "--overwrite"])
    bad = rows(tmp_path / "set")["skipped", "not UTF-8"]
    assert (bad["files"], bad["num_bytes"]) == (1, 1) and "bad.txt" in bad["examples"][0]


@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", ".work/thesis.tex", "plan.sha256", "train-000000.tar"])
def test_a_folder_with_other_files_is_left_alone(corpus: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "set" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("all my work")
    for more in ([], ["--overwrite"]):
        with pytest.raises(DataError, match="holds other files"):
            run(corpus, tmp_path / "set", *more)
    assert theirs.read_text() == "all my work"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


def test_files_beside_a_dataset_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "set", "--workers", "1", "--stage", "scan")
    names = ["train-2024.csv", "train-000001.xlsx", "notes.partial", "train-000000.tar.partial.bak", ".notes.tmp"]
    for name in names:
        (tmp_path / "set" / name).write_text("precious")
    run(corpus, tmp_path / "set", "--workers", "1")
    run(corpus, tmp_path / "set", "--workers", "1", "--overwrite", "--shard-megabytes", "0.01")
    assert [(tmp_path / "set" / name).read_text() for name in names] == ["precious"] * len(names)


def test_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(text_of(number))
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "set"), "--vocab-size", "320", "--workers", "1"]
    prepare([*arguments, "--stage", "scan"])
    status = (tmp_path / "3.txt").stat()
    (tmp_path / "3.txt").write_text(text_of(3).replace("3", "4"))
    os.utime(tmp_path / "3.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"3\.txt: changed since it was scanned"):
        prepare(arguments)
    (tmp_path / "3.txt").write_text(text_of(3))
    with pytest.raises(DataError, match="--overwrite"):
        prepare(arguments)


SBATCH = """#!/bin/bash
# Runs the tasks of an array at once and prints a job's number, as sbatch --parsable does.
while [[ $1 != --wrap ]]; do [[ $1 == --array=0-* ]] && last=${1#--array=0-}; echo "$1" >> "$SBATCH_LOG"; shift; done
for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash -c "$2" >&2 || exit 1; done
wc -l < "$SBATCH_LOG"
"""


def test_the_array_script_gives_what_one_machine_gives(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SBATCH_LOG": str(tmp_path / "log"),
    }
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "a set"), "--exclude", "site-packages"]
    arguments += ["--vocab-size", "400", "--validation-fraction", "0.1"]
    script = Path(__file__).parents[2] / "slurm" / "prepare.sh"
    subprocess.run(["bash", script, "2", "--partition=cpu", "--", *arguments], env=environment, check=True)
    assert digest_of(tmp_path / "a set") == digest_of(prepared)
    submitted = (tmp_path / "log").read_text().split("--parsable")[1:]
    assert [("dependency=afterok:" in each, "partition=cpu" in each) for each in submitted] == [
        (False, True),
        *[(True, True)] * 4,
    ]
