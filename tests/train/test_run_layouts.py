"""Whole runs under other layouts leave the metrics, entropies and evaluations of one process."""

import json
import shutil
from pathlib import Path

import pytest

from tests.train.runs import assert_close, rows, run_main, without_times

PARTIAL_BATCH = "training.evaluation_samples=5"  # of micro-batches of 4 or 2: the last is not full

LAYOUTS = {
    "tp=2:sp=1:cp=2": (
        4,
        ["tensor_parallel_size=2", "sequence_parallel=true", "context_parallel_size=2", "replica_check_interval=3"],
    ),
    "pp=2:dp=2": (4, ["pipeline_parallel_size=2", "replica_check_interval=3"]),
    "dp=2:zero=3": (2, ["zero_stage=3"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_those_of_one_process(tiny_config: Path, tmp_path: Path, layout: str) -> None:
    world_size, keys = LAYOUTS[layout]
    parallel = [f"parallel.{key}" for key in keys]
    if "dp=2" in layout:
        parallel.append("training.micro_batch_size=2")
    common = [PARTIAL_BATCH, "model.init_std=0.1", "training.train_steps=6", "training.evaluation_interval=3"]
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert run_main(1, tiny_config, *common, f"run_dir={whole}").statuses == [0]
    answer = run_main(world_size, tiny_config, *common, *parallel, f"run_dir={sharded}")
    assert answer.statuses == [0] * world_size, answer.stderr
    expected, found = without_times(whole), without_times(sharded)
    assert sum("validation_loss" in row for row in expected) == 2 and len(expected) == 8
    assert_close(found, expected, 1e-5)
    for there, here in zip(rows(whole, "entropy.jsonl"), rows(sharded, "entropy.jsonl"), strict=True):
        assert json.dumps(there).count("null") == json.dumps(here).count("null")
        for name, values in there.items():
            assert _flat(here[name]) == pytest.approx(_flat(values), rel=1e-5)


@pytest.mark.slow
def test_a_bf16_run_reads_whole_weights_whatever_is_hidden(tiny_config: Path, tmp_path: Path) -> None:
    """Evaluations, replica checks, entropies and checkpoints see no weight that is still gathered."""
    common = ["training.precision=bf16", "model.init_std=0.1", "logging.interval=1", "training.evaluation_interval=3"]
    common += ["parallel.replica_check_interval=1", "training.micro_batch_size=2", "checkpoint.interval=4"]
    found = {}
    for overlaps in ("true", "false"):
        run = tmp_path / overlaps
        keys = [f"deepspeed.zero_optimization.overlap_comm={overlaps}", f"run_dir={run}"]
        for steps in (6, 10):  # the second time from a checkpoint
            answer = run_main(2, tiny_config, *common, *keys, f"training.train_steps={steps}")
            assert answer.statuses == [0, 0], answer.stderr
        found[overlaps] = without_times(run), rows(run, "entropy.jsonl")
    assert found["true"] == found["false"]
    whole = found["true"][0]
    assert len([row for row in whole if "loss" in row]) >= 10
    losses: dict[str, list[float]] = {}
    for world_size, layout in ((2, "parallel.zero_stage=2"), (2, "parallel.pipeline_parallel_size=2"), (1, "")):
        run = tmp_path / f"other{world_size}{layout}"
        shutil.copytree(tmp_path / "true", run)
        keys = [*common, f"run_dir={run}", "training.train_steps=14", *([layout] if layout else [])]
        answer = run_main(world_size, tiny_config, *keys)
        assert answer.statuses == [0] * world_size, answer.stderr
        losses[layout] = [row["loss"] for row in without_times(run) if row["step"] > 10 and "loss" in row]
        assert len(losses[layout]) == 4 and losses[layout] == pytest.approx(losses["parallel.zero_stage=2"], rel=2e-3)


def _flat(values: object) -> list[float]:
    if isinstance(values, list):
        return [number for each in values for number in _flat(each)]
    assert isinstance(values, int | float)
    return [float(values)]
