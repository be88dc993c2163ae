"""A run of a suite that is a conversion: a chain of trainings, each from the weights of the one before."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import journal, rows
from tests.train.study.test_study import write_suite
from train.study.__main__ import main
from train.study.suite import SuiteError, load_suite

PLAIN: dict[str, Any] = {"architecture": "SM+LN+G", "biases": "all"}
STAGES: list[dict[str, Any]] = [
    {"name": "plain"},
    {"name": "linear", "config": {"model": {"activation": "identity", "fused_ffn": True}}},
    {"name": "no_norms", "config": {"model": {"norm": "none", "temperature": "per_head"}}},
]


def test_each_stage_starts_where_the_one_before_ended(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"name": "chain", "config": {"model": PLAIN}, "conversion": STAGES}
    file = write_suite(tmp_path, [entry], dataset)
    assert main(["run", str(file)]) == 0
    folder = tmp_path / "runs" / "chain" / "seed1"
    first, second, third = (folder / stage["name"] for stage in STAGES)
    assert not any(row["event"] == "initial weights" for row in journal(first))
    for before, after in ((first, second), (second, third)):
        event = next(row for row in journal(after) if row["event"] == "initial weights")
        assert event["address"].startswith(str(before)) and event["left_out"] == [] == event["anew"]
        end = next(row["validation_loss"] for row in reversed(rows(before)) if "validation_loss" in row)
        start = next(row["ce_loss"] for row in rows(after) if "ce_loss" in row)
        assert start < 1.05 * end, "an untrained model has the loss of a uniform guess, ln 400 = 6.0"
        assert end < 5.9
    model = json.loads((third / "config.json").read_text())["config"]["model"]
    assert (model["norm"], model["activation"], model["fused_ffn"]) == ("none", "identity", True)
    capsys.readouterr()
    assert main(["status", str(file), "--json"]) == 0
    (result,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert result["state"] == "done"


def test_faults_name_the_stage(tmp_path: Path) -> None:
    def fault(**entry: Any) -> str:
        with pytest.raises(SuiteError) as error:
            load_suite(write_suite(tmp_path, [{"name": "chain", **entry}]))
        return str(error.value)

    wrong = [*STAGES, {"name": "wide", "config": {"model": {"fused_ffn": True, "activation": "gelu"}}}]
    assert "conversion wide: model.fused_ffn = true needs" in fault(config={"model": PLAIN}, conversion=wrong)
    assert "conversion = " in fault(conversion=[{"name": "a"}, {"name": "a"}])
    assert "a conversion has no budgets_tokens" in fault(conversion=STAGES, budgets_tokens=[1e4])
