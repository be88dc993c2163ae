"""The seconds of a start by phase: they add up, what takes long is shown, and a run journals them."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.train.runs import journal, run_main
from train.start import timeline
from train.start.timeline import PHASES, Timeline


def test_an_inner_phase_interrupts_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([101.0, 101.0, 101.5, 103.5, 107.5, 115.5, 131.5])  # began at 100; two readings when it is made
    monkeypatch.setattr(timeline, "time", SimpleNamespace(monotonic=lambda: next(now)))
    start = Timeline(show=False, began=100.0)
    with start.phase("first_step"), start.phase("compile"):
        pass
    seconds = start.finish()
    assert seconds == {"python": 1.0, "first_step": 10.0, "compile": 4.0, "other": 16.5}
    assert list(seconds) == [name for name in PHASES if name in seconds]
    assert timeline.words({"python": 1.0, "weights": 0.01, "find_checkpoint": 8.0}) == (
        "first step done 9.0 s after the start: find checkpoint 8.0 s, python 1.0 s"
    )


def test_what_takes_long_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timeline, "SHOWN_AFTER_S", 0.05)
    start = Timeline(show=True, began=time.monotonic())
    with start.phase("ranks"):
        time.sleep(0.1)
        start.describe("ranks 3-5 of 8")
        time.sleep(0.2)
    start.finish()
    shown = capsys.readouterr().out
    assert "start: wait for the other ranks (0 s so far)\nstart: wait for the other ranks: ranks 3-5 of 8 (0 s" in shown


def test_without_a_start_phases_do_nothing() -> None:
    with timeline.phase("weights"), timeline.compiling():
        pass
    assert timeline.finish() == {}


def test_a_run_journals_its_start(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_main(1, tiny_config, "training.train_steps=2", "training.compile=off")
    assert answer.statuses == [0], answer.stderr
    (event,) = [row for row in journal(tmp_path / "run") if row["event"] == "first step done"]
    assert {"python", "check", "import", "join", "weights", "optimizer", "first_step"} <= event["seconds"].keys()
    assert "first step done" in answer.stdout and event["seconds"]["first_step"] > 0
