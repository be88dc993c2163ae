"""One reader of a run's folder: what it leaves out, what it refuses, and that nothing else parses a run's files."""

import re
from pathlib import Path

import pytest

from train.run import names
from train.run.journal import Journal
from train.run.reader import RunError, RunReader, read_lines, read_rows
from train.run.rows import JsonLines

ROOT = Path(__file__).parents[3]


def test_a_folder_without_a_run_is_empty(tmp_path: Path) -> None:
    run = RunReader(tmp_path / "none")
    assert run.config() is None and run.fingerprint() is None and run.goodput() is None and run.evaluation() is None
    assert run.metrics() == run.entropies() == run.journal() == run.complete_steps() == []
    assert not run.is_training() and run.failure() == ""


@pytest.mark.parametrize(
    "damage", ['{"step": 2, "lo', "", "[1]", '{"loss": 1}', '{"step": 1e400}', "\xff", "[" * 10**5]
)
def test_rows_leave_out_what_is_no_row_of_a_step(tmp_path: Path, damage: str) -> None:
    file = tmp_path / names.METRICS
    file.write_text(f'{{"step": 1}}\n{damage}\n{{"step": "3", "loss": null}}\n', encoding="latin-1")
    assert read_rows(file) == [{"step": 1}, {"step": 3, "loss": None}]


def test_a_line_says_whether_it_may_still_be_being_written(tmp_path: Path) -> None:
    file = tmp_path / names.METRICS
    file.write_text('{"step": 1}\nx\n{"step": 2}')
    assert [(line.number, line.row, line.is_whole) for line in read_lines(file)] == [
        (1, {"step": 1}, True), (2, None, True), (3, {"step": 2}, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "config.json: damaged, line 1, column 2: not JSON"),
        (b"[1]", "the content is a list, expected an object"),
        (b"{}", "damaged, config is missing"),
        (b'{"config": {"model": []}}', "damaged, config.model is a list, expected an object"),
        (b'{"config": {"model": {"num_layers": NaN}}}', "NaN is not JSON"),
        (b"[" * 10**5, "too deep"),
        (b"\xff", "byte 0 is not UTF-8"),
        (None, "cannot be read .Is a directory"),
    ],
)
def test_a_damaged_description_names_file_and_remedy(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / names.CONFIG
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(RunError, match=words + r".*; restore it or choose another run_dir$"):
        RunReader(tmp_path).config()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / names.METRICS, last_step=0)
    rows.write({"step": 1, "loss": float("nan"), "entropies": [[1.0, float("inf")]]})
    Journal(tmp_path).write("started", step=0)
    run = RunReader(tmp_path)
    assert run.metrics() == [{"step": 1, "loss": None, "entropies": [[1.0, None]]}]
    assert [(event["event"], event["step"]) for event in run.journal()] == [("started", 0)]
    assert JsonLines(tmp_path / names.METRICS, last_step=0) and run.metrics() == [], "cut back to the resumed step"


def test_checkpoints_are_complete_or_do_not_count(tmp_path: Path) -> None:
    run = RunReader(tmp_path)
    for folder in ("step_00000012", "step_00000004", "step_00000008.tmp", "other"):
        (tmp_path / names.CHECKPOINTS / folder).mkdir(parents=True)
        (tmp_path / names.CHECKPOINTS / folder / names.MARKER).touch()
    run.checkpoint(16).mkdir()
    assert run.complete_steps() == [4, 12] and run.checkpoint(4).name == "step_00000004"
    (run.checkpoint(12) / names.MARKER).write_text('{"checkpoint": {"dataset": {"fingerprint": "97579c15"}}}')
    assert run.fingerprint() == "97579c15", "as an earlier version left it"
    (tmp_path / names.CONFIG).write_text('{"dataset": {"fingerprint": "f00d"}}')
    assert run.fingerprint() == "f00d"


def test_the_names_of_a_runs_files_are_spelt_once() -> None:
    """Docstrings and messages may name them; code takes the constants."""
    files = [value for key, value in vars(names).items() if key.isupper() and isinstance(value, str) and "." in value]
    spelt = re.compile("|".join(re.escape(f'"{file}"') for file in files))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "train").rglob("*.py"))
        if path != ROOT / "train" / "run" / "names.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if spelt.search(line)
    ]
    assert found == []
