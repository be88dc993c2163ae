"""Test that a run stops after its first step if a parameter got no gradient, and names the parameter."""

from pathlib import Path

import pytest

from parallel.names import listed
from tests.train.faulty import with_bad_samples, with_compiler, with_lost_gradient, without_compiler
from tests.train.runs import journal, rows, run_faulty, run_main

ONE_STEP = ["training.train_steps=1", "training.evaluation_interval=0"]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ([], 1),
        (["parallel.zero_stage=2"], 2),
        (["parallel.zero_stage=3"], 2),
        (["parallel.pipeline_parallel_size=2"], 2),
        (["training.precision=bf16", "parallel.context_parallel_size=2"], 2),
    ],
)
def test_a_lost_gradient_is_named_before_the_second_step(
    tiny_config: Path, tmp_path: Path, layout: list[str], world_size: int
) -> None:
    answer = run_faulty(with_lost_gradient, world_size, tiny_config, layout)
    assert answer.statuses == [2] * world_size
    assert "the gradient is exactly zero of layers.{0,1}.attention.temperature_parameter." in answer.stderr
    assert "Set training.compile=off" in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stderr.count("error: ") == 1
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert not [row for row in rows(tmp_path / "run") if row["step"] > 1]


def test_a_shard_of_one_tensor_parallel_rank_counts_by_itself(tiny_config: Path) -> None:
    answer = run_faulty(with_lost_gradient, 2, tiny_config, ["parallel.tensor_parallel_size=2"], 1)
    assert answer.statuses == [2, 2]
    assert "layers.{0,1}.attention.temperature_parameter. Nothing was saved" in answer.stderr
    assert "layout tp=2 " in answer.stderr


def test_a_resumed_run_is_looked_at_too(tiny_config: Path) -> None:
    assert run_main(1, tiny_config, *ONE_STEP).statuses == [0]
    answer = run_faulty(with_lost_gradient, 1, tiny_config, [])
    assert answer.statuses == [2] and "temperature_parameter" in answer.stderr


@pytest.mark.parametrize(("precision", "named"), [("bf16", "embedding.position.weight, "), ("fp32", "at least one")])
def test_gradients_that_are_not_finite_stop_a_new_run(tiny_config: Path, precision: str, named: str) -> None:
    keys = [f"training.precision={precision}"]
    answer = run_faulty(with_bad_samples, 2, tiny_config, keys, 0, 1000, float("inf"), 1)
    assert answer.statuses == [2, 2]
    assert f"the gradient is not finite of {named}" in answer.stderr and "exactly zero" not in answer.stderr


def test_a_resumed_run_skips_such_a_step_and_looks_at_the_next(tiny_config: Path, tmp_path: Path) -> None:
    first = ["training.train_steps=6"]
    assert run_main(1, tiny_config, *first).statuses == [0]
    sampled = rows(tmp_path / "run")[-1]["tokens"] // 32
    answer = run_faulty(with_bad_samples, 1, tiny_config, [], sampled, sampled + 8, float("inf"), 0)
    assert answer.statuses == [0], answer.stderr
    assert [line["step"] for line in journal(tmp_path / "run") if line["event"] == "skipped step"] == [7]


@pytest.mark.parametrize("fault", ["input lost", "input scaled"])
def test_a_compiled_block_with_other_gradients_is_named(tiny_config: Path, fault: str) -> None:
    answer = run_faulty(
        with_compiler, 2, tiny_config, ["training.compile=on", "parallel.context_parallel_size=2"], fault
    )
    assert answer.statuses == [2, 2]
    assert "the compiled block's gradient is not the uncompiled block's of layers.{0,1}.input" in answer.stderr


@pytest.mark.parametrize("verify", ["true", "false"])
def test_a_compiler_that_is_turned_off_is_one_message(tiny_config: Path, tmp_path: Path, verify: str) -> None:
    keys = ["training.compile=on", f"health.verify_first_step={verify}"]
    answer = run_faulty(without_compiler, 2, tiny_config, keys)
    assert answer.statuses == [2, 2]
    assert "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE" in answer.stderr
    assert answer.stderr.count("error: ") == 1 and "Traceback" not in answer.stderr
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_without_the_comparison_what_the_optimizer_gets_still_tells(tiny_config: Path) -> None:
    keys = ["training.compile=on", "health.verify_first_step=false", "model.tied_head=false"]
    answer = run_faulty(with_compiler, 1, tiny_config, keys, "input lost")
    assert answer.statuses == [2]
    assert "exactly zero of embedding.position.weight, embedding.word.weight" in answer.stderr


def test_the_comparison_is_journaled_with_its_cost(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_faulty(with_compiler, 1, tiny_config, ["training.compile=on", *ONE_STEP], "none")
    assert answer.statuses == [0], answer.stderr
    (line,) = [line for line in journal(tmp_path / "run") if line["event"] == "compiled blocks verified"]
    assert line["blocks"] == 2 and line["largest_error"] == 0.0 and line["uncompiled_s"] > 0


def test_names_are_joined_by_layer() -> None:
    assert listed(["head.weight"]) == "head.weight"
    assert listed(["layers.0.ffn.alpha", "layers.10.ffn.alpha", "layers.3.ffn.beta"]) == (
        "layers.{0,10}.ffn.alpha, layers.3.ffn.beta"
    )
    assert listed([f"layers.0.{n}" for n in range(15)]).endswith("layers.0.11 and 3 kinds more")
