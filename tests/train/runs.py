"""Whole runs through train.main, and what they leave behind."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parallel.local_ranks import run_ranks

TIMES = {"step_time_s", "tokens_per_second", "data_wait_s", "goodput", "slowest_rank", "slowest_over_median"}
Output = tuple[int, str, str]


@dataclass
class Answer:
    """What all ranks gave back."""

    statuses: list[int]
    stdout: str
    stderr: str


def run_main(world_size: int, config: Path, *overrides: str) -> Answer:
    return run_faulty(main_output, world_size, config, list(overrides))


def run_faulty(
    function: Callable[..., Output], world_size: int, config: Path, overrides: list[str], *args: Any
) -> Answer:
    """Runs `function(arguments, *args)`, which calls train.main in its own way, on every rank."""
    answers = run_ranks(function, world_size, ["--config", str(config), *overrides], *args)
    return Answer([a[0] for a in answers], "".join(a[1] for a in answers), "".join(a[2] for a in answers))


def main_output(arguments: list[str]) -> Output:
    from train.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def journal(run: Path) -> list[dict]:
    return rows(run, "journal.jsonl")


def assert_close(found: list[dict], expected: list[dict], relative: float) -> None:
    """Compare rows of metrics.jsonl, whose values are numbers or lists of numbers."""
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            assert here[key] == pytest.approx(value, rel=relative, abs=0), (there["step"], key)


def without_times(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run, name)]
