"""The table of faults: every name is an error of this project, and phases and bases are told apart."""

import ast
import errno
from pathlib import Path

import pytest

from data.errors import DamagedShardError, DataError
from train.config import ConfigError
from train.faults import BEFORE_TRAINING, FAILED, FAULTS, REFUSED, Reporter, explained, fault_of, report

ROOT = Path(__file__).parents[2]


def test_every_name_is_a_class_of_this_project_once() -> None:
    files = [file for package in ("data", "parallel", "train") for file in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert {name: classes.count(name) for name in FAULTS} == dict.fromkeys(FAULTS, 1)
    assert BEFORE_TRAINING.keys() <= FAULTS.keys()


def test_a_subclass_is_its_base_and_the_nearest_base_counts() -> None:
    class StartMemoryError(RuntimeError): ...

    class Narrower(StartMemoryError): ...

    assert fault_of(DamagedShardError("x"), has_started=True) == FAULTS["DataError"]
    assert fault_of(Narrower(), has_started=True) == FAULTS["StartMemoryError"]
    assert fault_of(KeyError("x"), has_started=True) is None


def test_bad_data_refuses_a_start_and_fails_a_run() -> None:
    before, after = (fault_of(DataError("x"), has_started) for has_started in (False, True))
    assert before is not None and after is not None
    assert (before.status, before.reporter) == (REFUSED, Reporter.EACH_NODE)
    assert (after.status, after.reporter) == (FAILED, Reporter.EACH_RANK)


def test_errors_of_the_system_and_of_communication_get_a_message() -> None:
    full = explained(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), "runs/x")
    lost = explained(RuntimeError("[gloo/transport] Connection closed by peer\nmore"), "runs/x")
    assert full is not None and str(full[0]).startswith("runs/x/metrics.jsonl: No space left on device;")
    assert lost is not None and "lost touch with another rank" in str(lost[0]) and "more" not in str(lost[0])
    assert explained(RuntimeError("shapes differ"), "runs/x") is None


@pytest.mark.parametrize(
    ("rank", "local_rank", "reporter", "is_printed"),
    [
        ("0", "0", Reporter.RANK_ZERO, True),
        ("4", "0", Reporter.RANK_ZERO, False),
        ("4", "0", Reporter.EACH_NODE, True),
        ("5", "1", Reporter.EACH_NODE, False),
        ("5", "1", Reporter.EACH_RANK, True),
    ],
)
def test_who_reports(
    rank: str,
    local_rank: str,
    reporter: Reporter,
    is_printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    fault = next(each for each in [*FAULTS.values(), *BEFORE_TRAINING.values()] if each.reporter is reporter)
    assert report(ConfigError(["one", "two"]), fault) == fault.status
    who = "" if rank == "0" else f"rank {rank}: "
    assert capsys.readouterr().err == (f"error: {who}one\nerror: {who}two\n" if is_printed else "")
