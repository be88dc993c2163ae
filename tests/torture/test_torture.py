"""The torture itself: its table and its page agree, its judge sees losses, a few trials of it run."""

import importlib
import json
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tests.torture
from tests.torture.attack import ATTACKS, Lost, Outcome, Trial
from tests.torture.judge import check_ending, check_untouched, judged, snapshot, survived
from tests.torture.processes import ROOT, Ended
from tests.torture.stand import STEPS

PAGE = (ROOT / "docs/guides/promises.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]*\.py):(\w+)`", PAGE)

for module in pkgutil.iter_modules(tests.torture.__path__):
    if not module.name.startswith(("__", "test_")):
        importlib.import_module(f"tests.torture.{module.name}")


def test_every_promise_names_a_test_that_exists() -> None:
    promises = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(promises) > 20
    assert [line for line in promises if "`tests/" not in line] == []
    missing = [name for file, name in NAMED if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_every_attack_tests_a_promise() -> None:
    assert ATTACKS.keys() - {name for _, name in NAMED} == set()
    assert all(each.description for each in ATTACKS.values())


class FakeStand:
    """A stand whose uninterrupted run was written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint = folder / f"checkpoints/step_{STEPS:08d}"
        checkpoint.mkdir(parents=True)
        rows = [{"step": 1, "loss": 2.5, "step_time_s": 0.1}, {"step": 2, "loss": 2.4, "step_time_s": 0.2}]
        for name in ("metrics", "entropy", "ranks", "journal"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "goodput.json").write_text('{"goodput": 0.5, "seconds": {"steps": 1.0}}')
        chunk = {"offsets": [0, 0], "sizes": [1, 2], "file": "a.bin", "offset": 0}
        table = {"x": {"dtype": "float32", "shape": [1, 2], "chunks": [chunk]}}
        (checkpoint / "tensors.json").write_text(json.dumps(table))
        (checkpoint / "a.bin").write_bytes(bytes([0, 0, 128, 63, 0, 0, 0, 64]))

    def straight(self, layout: object) -> Path:
        return self.folder


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    stand = FakeStand(tmp_path / "straight")
    shutil.copytree(stand.folder, tmp_path / "run")
    return Trial("fake:1:1", stand, tmp_path, random.Random(1))  # type: ignore[arg-type]


def test_an_equal_run_survives_whatever_its_times(trial: Trial) -> None:
    run = trial.folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "step_time_s": 9.0}) + "\n" for row in rows))
    assert judged(run, trial, Ended([0], ["done"])) is Outcome.SURVIVED


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("metrics.jsonl", b"2.4", b"2.40000001"),
        ("metrics.jsonl", b'"loss": 2.4', b'"loss": NaN'),
        ("entropy.jsonl", b'{"step": 1, "loss": 2.5, "step_time_s": 0.1}\n', b""),
        ("ranks.jsonl", b'"step": 2', b'"step": 3'),
        ("goodput.json", b"1.0", b"-1.0"),
        ("goodput.json", b"0.5", b"1e400"),
        (f"checkpoints/step_{STEPS:08d}/a.bin", b"\x80\x3f", b"\x80\x3e"),
        (f"checkpoints/step_{STEPS:08d}/tensors.json", b'"x"', b'"y"'),
    ],
)
def test_the_judge_sees_what_differs(trial: Trial, file: str, old: bytes, new: bytes) -> None:
    path = trial.folder / "run" / file
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(Lost):
        survived(trial.folder / "run", trial)


@pytest.mark.parametrize(
    ("statuses", "output"),
    [
        ([None], "error: x\n"),
        ([1], "Traceback (most recent call last):\nValueError: x\n"),
        ([-signal.SIGSEGV], "error: x\n"),
        ([7], "error: x\n"),
        ([2], "no message at all\n"),
        ([2], "error: \x1b[31mred\n"),
        ([2], "error: " + "x" * 5000 + "\n"),
    ],
)
def test_the_judge_sees_bad_endings(statuses: list[int | None], output: str) -> None:
    with pytest.raises(Lost):
        check_ending(Ended(statuses, [output]))


def test_a_clear_message_is_one(trial: Trial) -> None:
    assert judged(trial.folder / "run", trial, Ended([2], ["error: x is 3, expected 4\n"])) is Outcome.NAMED


def test_the_judge_sees_other_peoples_files_change(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    before = snapshot(tmp_path)
    check_untouched(before, tmp_path)
    mine.write_text("yours")
    with pytest.raises(Lost):
        check_untouched(before, tmp_path)
    mine.unlink()
    with pytest.raises(Lost):
        check_untouched(before, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost(tmp_path: Path) -> None:
    """Ten minutes of every attack."""
    command = [sys.executable, "-m", "tests.torture", "--minutes", "10", "--json", str(tmp_path / "trials.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(json.loads((tmp_path / "trials.json").read_text())["trials"]) > 20
