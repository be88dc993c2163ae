"""A new metric is a line where it is computed and a line where it is named; it is then the same under every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import Output, main_output, rows, run_faulty


def with_metric(arguments: list[str]) -> Output:
    """Train with one more metric: the root mean square of what enters the head."""
    from parallel.engine.telemetry import METRICS
    from parallel.sharding.stage import Stage

    loss = Stage.loss

    def measuring(self: Any, x_TBD: torch.Tensor, labels_TB: torch.Tensor) -> torch.Tensor:
        self.measure("final_rms", x_TBD.float().square().mean().sqrt())
        return loss(self, x_TBD, labels_TB)

    METRICS["final_rms"] = METRICS["ce_loss"]
    Stage.loss = measuring  # type: ignore[method-assign]
    return main_output(arguments)


def test_a_new_metric_is_logged_and_the_same_under_every_layout(tiny_config: Path, tmp_path: Path) -> None:
    found = {}
    for world_size, overrides in {
        1: [],
        2: ["parallel.tensor_parallel_size=2"],
        4: ["parallel.pipeline_parallel_size=2", "training.micro_batch_size=4"],
    }.items():
        run = tmp_path / f"{world_size}"
        answer = run_faulty(with_metric, world_size, tiny_config, [f"run_dir={run}", *overrides])
        assert answer.statuses == [0] * world_size, answer.stderr
        found[world_size] = [row["final_rms"] for row in rows(run) if "loss" in row]
    assert len(found[1]) == 12 and len(set(found[1])) == 12 and min(found[1]) > 0
    for values in found.values():
        assert values == pytest.approx(found[1], rel=1e-5)


def test_a_metric_that_nobody_named_is_an_error(tiny_config: Path) -> None:
    answer = run_faulty(unnamed, 1, tiny_config, [])
    assert answer.statuses == [1] and "not in METRICS: final_rms" in answer.stderr


def unnamed(arguments: list[str]) -> Output:
    """Measure without naming the metric; the assertion is one of ours, so it leaves main as it is."""
    from parallel.sharding.stage import Stage

    loss = Stage.loss

    def measuring(self: Any, x_TBD: torch.Tensor, labels_TB: torch.Tensor) -> torch.Tensor:
        self.measure("final_rms", x_TBD.float().mean())
        return loss(self, x_TBD, labels_TB)

    Stage.loss = measuring  # type: ignore[method-assign]
    try:
        return main_output(arguments)
    except AssertionError as error:
        return 1, "", str(error)
