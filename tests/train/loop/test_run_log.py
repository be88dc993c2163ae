"""The logs of a run while somebody removes, replaces or blocks them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from parallel.engine.telemetry import HeadSnapshot
from train.config import Config
from train.config.config import config_from_dict
from train.loop.goodput import Goodput
from train.loop.log import RunLog, is_validated, seconds_after
from train.run import names
from train.run.reader import RunReader

HEADS = HeadSnapshot(
    entropy_nats=[[1.0, 2.0]], threshold=None, temperature=None, temperature_min=None, temperature_max=None,
    alpha=None, beta=None,
)  # fmt: skip
RANKS = {"forward_s": [0.1], "data_wait_s": [0.0], "slowest_rank": 0, "slowest_host": "a", "slowest_over_median": 1.0}


def config(run_dir: Path, **logging: Any) -> Config:
    return config_from_dict({"run_dir": str(run_dir), "training": {"train_steps": 100}, "logging": logging})


def opened(folder: Path, step: int = 0, recorded: dict[str, Any] | None = None, tensorboard: bool = False) -> RunLog:
    here = config(folder, tensorboard=tensorboard, image_interval=1)
    folder.mkdir(exist_ok=True)
    return RunLog(folder, here, step, [], {}, recorded or {})


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return opened(tmp_path / "run")


def step(log: RunLog, number: int) -> None:
    row = {"step": number, "tokens": number, "loss": 1.0, "step_time_s": 2.0, "tokens_per_second": 1.0}
    log.steps([row], HEADS, RANKS, Goodput(log.folder))


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in RunReader(folder).journal() if row["event"] == event]


def test_files_removed_or_replaced_lose_no_row(log: RunLog, capsys: pytest.CaptureFixture[str]) -> None:
    step(log, 1)
    for name in (names.METRICS, names.RANKS, names.JOURNAL):
        (log.folder / name).unlink()
    (log.folder / names.ENTROPY).unlink()
    (log.folder / names.ENTROPY).write_text("of somebody else")
    step(log, 2)
    step(log, 3)
    log.end(3, None, None, Goodput(None), "")
    run = RunReader(log.folder)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] == [row["step"] for row in run.entropies()]
    assert [row["event"] for row in run.journal()] == ["started", "fast start", *["damaged file"] * 4, "asked to stop"]
    assert (log.folder / f"{names.ENTROPY}.damaged").read_text() == "of somebody else"
    assert capsys.readouterr().err.count("while the run wrote to it; it is restored") == 4


def test_a_side_log_that_cannot_be_written_is_told_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / names.TENSORBOARD).write_text("a file in the way")
    (tmp_path / names.GOODPUT).mkdir()
    log = opened(tmp_path, tensorboard=True)
    for number in (1, 2, 3):
        log.steps(
            [{"step": number, "tokens": 1, "loss": 1.0, "tokens_per_second": 1.0}], HEADS, RANKS, _Stuck(tmp_path)
        )
    log.end(3, None, None, _Stuck(tmp_path), "")
    assert [row["file"] for row in events(tmp_path, "side log failed")] == [names.TENSORBOARD, names.GOODPUT]
    assert capsys.readouterr().err.count("the run goes on without it") == 2
    assert events(tmp_path, "asked to stop")[0]["side_log_failures"] == {names.TENSORBOARD: 1, names.GOODPUT: 4}


class _Stuck(Goodput):
    """Writes to a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self._path = folder / names.GOODPUT


@pytest.mark.slow
def test_event_files_that_are_removed_are_told_and_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path, tensorboard=True)
    for number in (1, 2, 3):
        step(log, number)
        if number == 1:
            shutil.rmtree(tmp_path / names.TENSORBOARD)
    log.close()
    assert capsys.readouterr().err.count("tensorboard: cannot be written") == 1
    assert os.listdir(tmp_path / names.TENSORBOARD)


def test_a_run_resumes_with_what_its_checkpoint_recorded(log: RunLog, capsys: pytest.CaptureFixture[str]) -> None:
    step(log, 1)
    recorded = log.prefixes()
    step(log, 2)
    log.close()
    assert seconds_after(log.folder, 1) == 2.0 and seconds_after(log.folder, 2) == 0.0
    capsys.readouterr()
    again = opened(log.folder, 1, recorded)
    assert capsys.readouterr().err == "" and [row["step"] for row in RunReader(log.folder).metrics()] == [1]
    again.close()
    damaged = (log.folder / names.METRICS).read_bytes().replace(b'"loss": 1.0', b'"loss": 3.0')
    (log.folder / names.METRICS).write_bytes(damaged)
    opened(log.folder, 1, recorded).close()
    assert f"what was found is kept as {names.METRICS}.damaged" in capsys.readouterr().err
    assert events(log.folder, "damaged file")[0]["kept_as"] == f"{names.METRICS}.damaged"
    opened(log.folder, 1, recorded).close()
    assert capsys.readouterr().err == "", "told once"


@pytest.mark.parametrize("logs", [{"metrics.jsonl": 3}, {"metrics.jsonl": {"bytes": "1"}}, {"journal.jsonl": []}])
def test_a_record_of_another_shape_counts_as_none(tmp_path: Path, logs: dict[str, Any]) -> None:
    opened(tmp_path, 4, logs).close()


def test_a_validation_counts_if_its_loss_is_finite(log: RunLog) -> None:
    log.metrics.write({"step": 6, "validation_loss": 2.0, "validation_tokens": 64})
    log.metrics.write({"step": 12, "validation_loss": float("nan"), "validation_tokens": 64})
    log.metrics.write({"step": 12, "validation_tokens": "many", "validation_loss": []})
    assert is_validated(log.folder, 6, 64) and not is_validated(log.folder, 6, 65)
    assert not is_validated(log.folder, 12, 64) and not is_validated(log.folder, 11, 1)
