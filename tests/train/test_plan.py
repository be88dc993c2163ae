"""Planning on paper: memory against measured peaks, what is printed, and which layouts fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.counting.footprint import footprint
from train.config import load_config
from train.cost.layouts import workload
from train.plan import main

ROOT = Path(__file__).parents[2]
ONE_BATCH = ["training.global_batch_size=8", "training.micro_batch_size=8"]

# torch.cuda.max_memory_allocated of training steps on one H200 at vocabulary 32,000, in GiB
MEASURED_GIB = [
    ("ereg.json", [], 9.80),
    ("baseline.json", [], 21.80),
    ("ereg_1b.json", ONE_BATCH, 32.5),
    ("ereg_1b.json", [*ONE_BATCH, "training.activation_recompute=selective"], 30.2),
    ("ereg_1b.json", [*ONE_BATCH, "training.activation_recompute=full"], 21.1),
    ("ereg_1b.json", ["training.global_batch_size=16", "training.micro_batch_size=16"], 46.0),
]


@pytest.mark.parametrize(("name", "overrides", "measured_gib"), MEASURED_GIB)
def test_peak_memory_is_within_two_percent_of_the_measured(
    name: str, overrides: list[str], measured_gib: float
) -> None:
    config = load_config(ROOT / "configs" / name, overrides)
    predicted_gib = footprint(workload(config, 1, 0, 32_000)).peak / 2**30
    assert predicted_gib == pytest.approx(measured_gib, rel=0.02)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_splitting_divides_what_is_split(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "8", "--gpu", "h100"]
    _, whole = planned(capsys, *common)
    _, halves = planned(capsys, *common, "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
    one, two = whole["plan"]["stages_bytes"][0], halves["plan"]["stages_bytes"][0]
    # a replicated FFN is not divided, nor what is kept of it
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.04)
    assert one["parameters"] / 2 < two["parameters"] < one["parameters"]
    _, staged = planned(capsys, *common, "parallel.pipeline_parallel_size=4")
    stages = staged["plan"]["stages_bytes"]
    assert len(stages) == 3 and staged["plan"]["step_time_s"]["bubble"] > 0
    assert stages[0]["activations"] > stages[1]["activations"] > stages[2]["activations"]  # micro-batches in flight
    assert all(layout["fits"] for layout in whole["layouts"]) and len(whole["layouts"]) > 10


@pytest.mark.parametrize("seq_length", [128, 2048], ids=["attention by memory", "attention by arithmetic"])
def test_attention_that_is_computed_again_costs_time(capsys: pytest.CaptureFixture[str], seq_length: int) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg.json"), "--gpus", "1", "--gpu", "h100"]
    arguments += [f"model.seq_length={seq_length}", f"training.micro_batch_size={65_536 // seq_length}"]
    times = {}
    for how in ("none", "selective", "full"):
        _, printed = planned(capsys, *arguments, f"training.activation_recompute={how}")
        times[how] = printed["plan"]["step_time_s"]
    again = times["none"]["attention"] / 3.5  # one forward pass more
    assert times["selective"]["attention"] == times["full"]["attention"]
    assert times["selective"]["total"] - times["none"]["total"] == pytest.approx(again)
    assert times["full"]["total"] > times["selective"]["total"]


def test_a_job_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "1", "--gpu", "a100"]
    status = main([*arguments, "training.micro_batch_size=64"])
    text = capsys.readouterr().out
    assert status == 1 and "does NOT fit in 79.2 GiB" in text and "Fastest of" in text and "Assumed:" in text
    assert main([*arguments, "training.micro_batch_size=8"]) == 0


def test_what_cannot_be_planned_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "3"]
    assert main([*arguments, "parallel.tensor_parallel_size=2"]) == 2
    assert "world size 3 is not a multiple of tensor_parallel_size(2)" in capsys.readouterr().err
