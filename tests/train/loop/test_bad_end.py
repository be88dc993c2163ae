"""A run whose last numbers went wrong does not end well, and what it saved before stays."""

import dataclasses
from pathlib import Path

import pytest

from tests.train.faulty import with_lost_weights
from tests.train.runs import Output, journal, main_output, run_faulty, run_main
from train.run.reader import RunReader


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_last_update_that_ruins_the_weights_is_no_good_end(
    tiny_config: Path, tmp_path: Path, world_size: int
) -> None:
    run, interval = RunReader(tmp_path / "run"), "checkpoint.interval=5"
    answer = run_faulty(with_lost_weights, world_size, tiny_config, [interval], 12)
    assert answer.statuses == [3] * world_size and answer.stderr.count("error: ") == 1
    assert "error: step 12: its update has made weights that are not finite" in answer.stderr
    assert run.complete_steps() == [5, 10] and journal(run.folder)[-1]["event"] == "stopped"
    assert run_main(world_size, tiny_config, interval).statuses == [0] * world_size and 12 in run.complete_steps()


def test_weights_that_an_update_ruined_are_not_saved_and_the_run_goes_back(tiny_config: Path, tmp_path: Path) -> None:
    overrides = ["checkpoint.interval=2", "health.skip_limit=2"]
    answer = run_faulty(with_lost_weights, 1, tiny_config, overrides, 4)
    went_back = [row["step"] for row in journal(tmp_path / "run") if row["event"] == "rolled back"]
    assert answer.statuses == [0] and went_back == [2]


def test_a_validation_that_is_not_finite_is_no_good_end_at_any_start(tiny_config: Path, tmp_path: Path) -> None:
    for _ in range(2):
        answer = run_faulty(with_lost_validation, 1, tiny_config, [])
        assert answer.statuses == [3] and "step 12: the validation loss after the last step is nan" in answer.stderr
    assert run_main(1, tiny_config).statuses == [0]


def with_lost_validation(arguments: list[str]) -> Output:
    import train.loop.trainer

    validate = train.loop.trainer.validate
    train.loop.trainer.validate = lambda *args: dataclasses.replace(validate(*args), loss=float("nan"))
    return main_output(arguments)
