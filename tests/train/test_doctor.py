"""train.doctor on two CPU processes: a table when all is well, names and exit status 1 when it is not."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.local_ranks import run_ranks
from train import doctor
from train.cost.links import Links, measured_links
from train.doctor import Row


def run_doctor(config: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> tuple[list[int], str, str]:
    answers = run_ranks(_doctor, 2, ["--config", str(config), "parallel.tensor_parallel_size=2", *arguments], prepare)
    return [a[0] for a in answers], answers[0][1], "".join(a[2] for a in answers)


def _doctor(arguments: list[str], prepare: Callable[[], None] | None) -> tuple[int, str, str]:
    from train import doctor
    from train.start import checks as doctor_checks

    doctor_checks.MATRIX, doctor_checks.COLLECTIVE_BYTES = 256, 1 << 16  # type: ignore[misc]
    doctor.OUTLIER = 0.0  # type: ignore[misc]  # two busy cores are no two equal devices
    if prepare is not None:
        prepare()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = doctor.main(arguments)
    return status, out.getvalue(), err.getvalue()


def test_all_is_well(tiny_config: Path, tmp_path: Path) -> None:
    statuses, table, errors = run_doctor(tiny_config, "--json", str(tmp_path / "doctor.jsonl"), "--all-shards")
    assert statuses == [0, 0], table + errors
    assert "2 ranks on 1 hosts" in table and "all is well" in table
    rows = {row["check"]: row for row in map(json.loads, (tmp_path / "doctor.jsonl").read_text().splitlines())}
    for check in ("matmul", "memory", "all-reduce tensor", "checkpoint write", "free space", "data", "clock skew"):
        assert len(rows[check]["values"]) == 2 and all(value is not None for value in rows[check]["values"]), check
    assert rows["versions"]["faults"] == []
    link = rows["all-reduce tensor"]["link"]
    assert (link["axis"], link["ranks"], link["nodes"]) == ("tensor", 2, 1)
    links = measured_links(tmp_path / "doctor.jsonl", Links(node=1e15, nic=47e9))
    assert links.node == 1e9 * max(link["gb_per_s"]) and links.nic == 47e9, "what was not measured stays as it was"
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_table_that_cannot_be_written_is_told_before_anything_is_examined(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--config", str(tiny_config), "--json", "no/folder/lines.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: --json no/folder/lines.jsonl: cannot be written")


def test_trouble_is_named(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = next(copy.glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    changes = [f"data.path={copy}", "checkpoint.path=/proc/nowhere"]
    statuses, table, _ = run_doctor(tiny_config, *changes, prepare=_wrong_clock_and_version)
    assert statuses == [1, 1]
    assert str(shard) in table and "/proc/nowhere" in table
    assert "its clock is 5.0 s off; set it (NTP)" in table and "rank 1 on " in table
    assert "python is '2.7', on rank 0 it is" in table
    assert table.count("TROUBLE") >= 4


def _wrong_clock_and_version() -> None:
    if os.environ["RANK"] == "1":
        import platform

        now = time.time
        time.time = lambda: now() + 5.0  # type: ignore[method-assign,assignment]
        platform.python_version = lambda: "2.7"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("override", "size", "words"),
    [
        ("checkpoint.path=zzz://a/b", "1", "checkpoint.path = 'zzz://a/b' cannot be used"),
        ("training.seed=1", "abc", "WORLD_SIZE = 'abc' in the environment: expected a whole number"),
    ],
)
def test_what_is_set_wrong_is_told_in_a_line(
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    size: str,
    words: str,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", size), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert doctor.main(["--config", str(tiny_config), override]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_what_cannot_start_is_told(tiny_config: Path) -> None:
    statuses, _, errors = run_doctor(tiny_config, "parallel.tensor_parallel_size=4")
    assert statuses == [2, 2] and "not a multiple" in errors


@pytest.mark.parametrize(("check", "named"), [("matmul", True), ("free space", False)])
def test_a_rank_far_below_the_median_is_named_where_speed_counts(check: str, named: bool) -> None:
    row = Row(check, "TFLOP/s", [700.0, 690.0, 400.0, 710.0], [])
    row.judge(["a", "b", "c", "d"])
    assert [("rank 2 on c: 400" in fault) for fault in row.faults] == [True] * named


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(_matmul_faults, 1, False) == [[]]
    (faults,) = run_ranks(_matmul_faults, 1, True)
    assert len(faults) == 1 and "a matrix product is wrong" in faults[0]


def _matmul_faults(broken: bool) -> Any:
    import torch

    from parallel.launch import initialize_distributed
    from train.start import checks as doctor_checks

    initialize_distributed()
    doctor_checks.MATRIX = 64  # type: ignore[misc]
    if broken:
        product = torch.Tensor.__matmul__

        def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            c = product(a, b)
            if c.dim() == 2:
                c[3, 5] += 1
            return c

        torch.Tensor.__matmul__ = wrong  # type: ignore[method-assign,assignment]
    return doctor_checks.matmul().faults
