"""Where a run's wall time went, whatever the clocks did."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from train.loop import goodput
from train.loop.goodput import CATEGORIES, Goodput
from train.run import names

YEAR_S = 365 * 86400


def kept(folder: Path, **changes: Any) -> None:
    """Write the file of a process that ended a minute ago."""
    now = goodput.moment()
    row = {**now, "updated": now["updated"] - 60, "uptime_s": now["uptime_s"] - 60, "seconds": SECONDS, **changes}
    (folder / names.GOODPUT).write_text(json.dumps({key: value for key, value in row.items() if value != "missing"}))


SECONDS = {**dict.fromkeys(CATEGORIES, 0.0), "steps": 900.0, "lost": 100.0}


@pytest.fixture(autouse=True)
def just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "process_age_s", lambda: 0.0)


@pytest.mark.parametrize("jump_s", [-50 * YEAR_S, -3600, 3600, 50 * YEAR_S])
def test_a_clock_that_is_set_between_two_processes_changes_nothing(tmp_path: Path, jump_s: float) -> None:
    kept(tmp_path, updated=time.time() + jump_s)
    seconds = Goodput(tmp_path).seconds
    assert seconds["down"] == pytest.approx(60, abs=5) and seconds["steps"] == 900


@pytest.mark.parametrize("jump_s", [-50 * YEAR_S, 3600, 50 * YEAR_S])
@pytest.mark.parametrize("key", ["boot_id", "uptime_s"])
def test_on_another_machine_what_no_clock_makes_credible_does_not_count(
    tmp_path: Path, key: str, jump_s: float
) -> None:
    kept(tmp_path, updated=time.time() + jump_s, **{key: "missing"})
    assert Goodput(tmp_path).seconds["down"] == 0
    kept(tmp_path, **{key: "missing"})
    assert Goodput(tmp_path).seconds["down"] == pytest.approx(60, abs=5)


def test_a_clock_that_is_set_while_the_run_goes_on_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Goodput(tmp_path)
    real = time.time
    for jump_s in (10 * YEAR_S, -10 * YEAR_S):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        counted.spent("steps")
        counted.write()
    assert 0 <= sum(counted.seconds.values()) < 60 and 0 <= counted.share <= 1
    assert Goodput(tmp_path).seconds["down"] < 60


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"{}", b'{"updated": 1, "seconds": {}}', b'{"updated": 1, "seconds": []}', b"[" * 10**5,
        json.dumps({"updated": 1, "seconds": {**SECONDS, "steps": -1}}).encode(),
        json.dumps({"updated": 1, "seconds": {**SECONDS, "down": 1e300}}).encode(),
        json.dumps({"updated": 1, "seconds": {**SECONDS, "down": float("nan")}}).encode(),
        json.dumps({"updated": "now", "seconds": SECONDS}).encode(),
        json.dumps({"updated": 1, "seconds": {**SECONDS, "data": True}}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_file_is_set_aside_and_counting_begins_anew(tmp_path: Path, content: bytes) -> None:
    file, aside = tmp_path / names.GOODPUT, tmp_path / f"{names.GOODPUT}.damaged"
    file.write_bytes(content)
    counted = Goodput(tmp_path)
    assert counted.damage is not None and counted.damage.kept_as == aside.name and aside.read_bytes() == content
    assert "the time of earlier processes is not counted" in str(counted.damage) and sum(counted.seconds.values()) == 0
    counted.write()
    assert Goodput(tmp_path).damage is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_set_aside_too(tmp_path: Path, make: Any) -> None:
    make(tmp_path / names.GOODPUT)
    counted = Goodput(tmp_path)
    counted.write()
    assert counted.damage is not None and (tmp_path / names.GOODPUT).is_file()


def test_the_age_of_a_process_is_that_of_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    age_s = goodput.process_age_s()
    assert 0 < age_s < goodput.MOST_START_S
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert goodput.process_age_s() == pytest.approx(age_s, abs=5)
    for status in ("", "1 (a) b) S " + "0 " * 30, "1 (a) S " + "9" * 30 + " 9" * 30):
        monkeypatch.setattr(goodput, "STATUS", tmp_path / "stat")
        (tmp_path / "stat").write_text(status)
        assert 0 <= goodput.process_age_s() <= goodput.MOST_START_S
