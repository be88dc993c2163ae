"""The command that a user runs before a large job: what it prints, its exit status, and what it refuses."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel.layout import Layout, parse_layout
from parallel.local_ranks import RankError
from tests.parallel.sabotage import (
    measure_losing_a_gradient,
    measure_losing_as_trained,
    measure_never,
    measure_never_compiled,
)
from tests.parallel.tiny import EREG, SIZES, assert_layout, tiny_config, training_with
from train.compare import command, measurement
from train.compare.comparison import Allowance, Comparison, compare, gradient_limits, lost_gradients, worst_of
from train.compare.measurement import GradientPiece, Measured, assemble


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    tree = {
        "model": SIZES,
        "data": {"path": "no/dataset", "planned_vocab_size": 50},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "train_steps": 1},
    }
    file.write_text(json.dumps(tree))
    return file


def run(config_file: Path, *arguments: str) -> int:
    return command.main(["--config", str(config_file), *arguments])


def test_the_table_and_the_lines_beside_it(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines_file = config_file.with_name("lines.jsonl")
    assert run(config_file, "--layouts", "tp=2,dp=2:cp=2", "--batches", "1", "--json", str(lines_file)) == 0
    text = capsys.readouterr().out
    assert "2 of 2 layouts equal one process within 1e-05" in text and "BEYOND" not in text
    lines = [json.loads(line) for line in lines_file.read_text().splitlines()]
    assert [line["layout"] for line in lines] == ["tp=2", "dp=2:cp=2"]
    assert all(line["passed"] and line["gradient"] <= 1e-5 and line["worst_parameter"] for line in lines)
    assert lines[0]["sent_bytes"]["tensor"] > 0


def test_beyond_the_tolerance_the_status_is_one(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config_file, "--layouts", "tp=2", "--batches", "1", "--tolerance", "1e-12") == 1
    assert "BEYOND" in capsys.readouterr().out


SATURATED = [
    "model.architecture=SM+LN+G",
    "model.num_layers=2",
    "model.temperature=per_head",
    "model.temperature_init=0.002",
    "model.init_std=0.1",
    "training.seed=2",
]


def test_what_one_process_loses_in_float32_is_no_fault_of_a_layout(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layouts", "tp=2", "--batches", "1", *SATURATED]
    lines_file = config_file.with_name("lines.jsonl")
    assert run(config_file, *arguments, "--json", str(lines_file)) == 0
    assert "  rounding\n" in (text := capsys.readouterr().out) and "rounding: within 5 times what float32 loses" in text
    (line,) = map(json.loads, lines_file.read_text().splitlines())
    assert 1e-5 < line["gradient"] < 5 * line["rounding"]["gradient"]
    assert run(config_file, *arguments, "--tolerance", "1e-5") == 1
    assert "BEYOND" in capsys.readouterr().out
    assert run(config_file, *arguments, "--dtype", "float64") == 0


def test_rounding_excuses_five_times_itself_and_at_most_a_percent() -> None:
    def comparison(error: float) -> Comparison:
        return Comparison(0.0, 0.0, 0.0, gradient=error, worst_parameter="a")

    assert comparison(4e-4).within(1e-5, comparison(1e-4))
    assert not comparison(4e-4).within(1e-5)
    assert not comparison(6e-4).within(1e-5, comparison(1e-4))
    assert not comparison(2e-2).within(1e-5, comparison(1e-2))
    assert not comparison(float("nan")).within(1e-5, comparison(1e-4))
    assert not comparison(2e-5).within(1e-5, comparison(float("nan")))
    assert dataclasses.replace(comparison(0.0), gradient_norm=2e-5).within(1e-5, comparison(1e-4))
    assert not dataclasses.replace(comparison(0.0), loss=2e-5).within(1e-5, comparison(1e-4))
    assert not dataclasses.replace(comparison(0.0), entropy_nats=2e-5).within(1e-5, comparison(1e-4))


LIVELY = ["model.init_std=0.1", "model.temperature_init=0.02", "regularizer.margin=0.05", "training.precision=bf16"]


def test_the_arithmetic_of_training_is_held_to_what_one_process_rounds(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_file = config_file.with_name("lines.jsonl")
    arguments = ["--layouts", "tp=2:sp=1,dp=2:zero=3", "--dtype", "configured", "--json", str(lines_file), *LIVELY]
    assert run(config_file, *arguments) == 0, capsys.readouterr()
    assert "layouts in bf16, not compiled, as they train, against float64" in capsys.readouterr().out
    for line in map(json.loads, lines_file.read_text().splitlines()):
        assert line["passed"] and not line["lost"]
        assert 1e-3 < line["gradient"] <= line["allowed"] < 0.1  # of bf16, and no more


@pytest.mark.parametrize(("dtype", "layout"), [("configured", "dp=2:zero=2"), ("float32", "pp=2")])
def test_a_lost_gradient_is_a_failure_and_named(
    config_file: Path, capsys: pytest.CaptureFixture[str], dtype: str, layout: str
) -> None:
    with mock.patch("train.compare.measurement._measure_on_rank", measure_losing_a_gradient):
        assert run(config_file, "--layouts", layout, "--dtype", dtype, "--batches", "1", *LIVELY) == 1
    assert "LOST: layers.{0,1,2,3}.attention.temperature_parameter\n" in capsys.readouterr().out


def test_a_gradient_that_one_process_loses_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines_file = config_file.with_name("lines.jsonl")
    with mock.patch("train.compare.measurement._measure_on_rank", measure_losing_as_trained):
        arguments = ["--layouts", "tp=2", "--batches", "1", "--json", str(lines_file), *LIVELY]
        assert run(config_file, *arguments) == 1
    temperatures = "layers.{0,1,2,3}.attention.temperature_parameter"
    assert f"LOST by one process as it trains, so that no layout passes: {temperatures}" in capsys.readouterr().out
    (line,) = map(json.loads, lines_file.read_text().splitlines())
    assert not line["passed"] and not line["lost"] and len(line["lost_by_one_process"]) == 4


@pytest.mark.parametrize(
    ("named", "on_gpu", "expected"),
    [
        ({}, False, "float32"),
        ({}, True, "configured"),
        ({"precision": "bf16"}, False, "configured"),
        ({"compile": "on"}, False, "configured"),
        ({"precision": "fp32", "compile": "off"}, False, "float32"),
    ],
)
def test_what_runs_by_default(named: dict[str, Any], on_gpu: bool, expected: str) -> None:
    with mock.patch("torch.cuda.is_available", lambda: on_gpu):
        assert command.default_dtype(training_with(tiny_config(), **named)) == expected


def test_blocks_that_were_to_be_compiled_and_were_not_are_told() -> None:
    config = training_with(tiny_config(vocab_size=50), compile="on")
    with (
        mock.patch("train.compare.measurement._measure_on_rank", measure_never_compiled),
        pytest.raises(RankError, match="compiled nothing; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"),
    ):
        measurement.measure(config, 1, 50, torch.randint(50, (1, 8, 17)), "configured")


def test_a_gradient_that_is_small_by_luck_is_allowed_what_its_kind_is() -> None:
    errors = {"layers.0.a": 0.02, "layers.1.a": 0.0, "b": 0.0, "wild": math.nan}
    limits = gradient_limits(errors, dict.fromkeys(errors, torch.ones(2)), rounding=0.004)
    assert limits == pytest.approx({"layers.0.a": 0.034, "layers.1.a": 0.034, "b": 0.004, "wild": 0.004})
    assert worst_of({"layers.1.a": 0.03, "b": 0.004}, limits) == "b"


def test_single_numbers_share_the_error_of_the_furthest() -> None:
    errors = {"layers.0.ffn.alpha": 0.001, "layers.1.ffn.alpha": 0.0, "layers.0.ffn.beta": 0.01, "b": 0.0}
    sizes = {name: torch.ones(2 if name == "b" else 1) for name in errors}
    limits = gradient_limits(errors, sizes, rounding=0.004)
    assert limits == pytest.approx(dict.fromkeys(errors, 0.064) | {"b": 0.004})


def of_gradients(*batches: dict[str, Any]) -> Measured:
    gradients = [{name: torch.tensor(values) for name, values in batch.items()} for batch in batches]
    return Measured(torch.ones(len(batches), 3), gradients, [torch.ones(1, 1)] * len(batches), {})


def test_a_single_number_is_lost_if_it_is_zero_in_every_batch() -> None:
    """In bf16 two ranks' parts of a small one cancel now and then, which is no fault; of a vector not all elements."""
    expected = of_gradients({"alpha": 1e-6, "v": [1.0, 1.0]}, {"alpha": 2e-6, "v": [1.0, 1.0]})
    lost = [
        compare(of_gradients({"alpha": first, "v": [1.0, 1.0]}, {"alpha": second, "v": vector}), expected).lost
        for first, second, vector in [
            (1e-6, 0.0, [1.0, 1.0]),
            (0.0, 0.0, [1.0, 1.0]),
            (math.nan, 2e-6, [1.0, 1.0]),
            (1e-6, 0.0, [0.0, 0.0]),
        ]
    ]
    assert lost == [[], ["alpha"], ["alpha"], ["v"]]
    one_batch = of_gradients({"alpha": 1e-6}), of_gradients({"alpha": 0.0})
    assert compare(one_batch[1], one_batch[0]).lost == ["alpha"]


def test_what_one_process_loses_fails_every_layout_and_small_gradients_are_named() -> None:
    truth = of_gradients({"a": [1.0, 1.0], "small": [1e-6, 1e-6]})
    allowance = Allowance.of(truth, truth, "bf16")
    assert allowance.covers(compare(truth, truth, allowance)) and allowance.unseen == ["small"]
    # off by 1, as what is lost is, and thus within 1.5 times the error of the process that lost it
    losing, doubling = (of_gradients({"a": a, "small": [1e-6, 1e-6]}) for a in ([0.0, 0.0], [2.0, 2.0]))
    allowance = Allowance.of(losing, truth, "bf16")
    assert allowance.lost == ["a"] and not allowance.covers(compare(doubling, truth, allowance))


def test_what_counts_as_lost() -> None:
    expected = {"small": torch.tensor([1e-20, 0.0]), "none": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(2)}
    found = {"small": torch.zeros(2), "none": torch.zeros(2), "b": torch.tensor([1.0, torch.nan])}
    assert lost_gradients(found, expected) == ["small", "b", "c"]
    assert lost_gradients({**expected, "c": torch.ones(1)}, expected) == ["c"]  # a shard is missing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layouts", "tp=2", "--dtype", "configured", "--tolerance", "1e-3"], "--tolerance: in the configured"),
        (["--layouts", "tq=2"], "'tq=2' is no key=value of a layout; the keys are tp (tensor-parallel ranks)"),
        (["--layouts", "tp=2:tp=4"], "tp is given twice"),
        (["--layouts", "zero=4"], "zero=4 must be one of 1, 2, 3"),
        (["--layouts", "tp=3"], "model.num_attention_heads = 8 is not a multiple of"),
        (["--layouts", "tp=4:cp=4"], "tensor_parallel_size(4) * parallel.context_parallel_size(4) = 16"),
        (["--layouts", "pp=2:zero=2"], "zero_stage = 2 needs parallel.pipeline_parallel_size = 1"),
        (["--layouts", "dp=3"], "training.global_batch_size = 4 is not a multiple of acc(2) * dp(3)"),
        (["--layouts", "sp=1"], "sequence_parallel = true needs parallel.tensor_parallel_size > 1"),
        (
            ["--layouts", "acc=1,acc=2", "regularizer.granularity=per_head"],
            "layouts must agree in acc, not have [1, 2]",
        ),
        (["--layouts", "tp=1", "data.planned_vocab_size=null"], "no/dataset"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(config_file, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["configured", "float32"])
def test_one_process_that_does_not_run_is_one_message(
    config_file: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    with mock.patch("train.compare.measurement._measure_on_rank", measure_never):
        assert run(config_file, "--layouts", "tp=2", "--dtype", dtype) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: the one process that layouts are compared with did not run: MemoryError: no room for the model\n"
    )


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_compiler_that_is_turned_off_is_no_equality(config_file: Path, variable: str) -> None:
    command = [sys.executable, "-m", "parallel.compare", "--config", str(config_file), "--layouts", "dp=2"]
    result = subprocess.run(
        [*command, "--batches", "1", "model.num_layers=1", "training.compile=on", "training.precision=fp32"],
        env={**os.environ, variable: "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE" in result.stderr
    assert result.stderr.count("\n") == 1 and "equal" not in result.stdout


def test_a_gradient_of_nan_is_never_within() -> None:
    gradient = {"a": torch.ones(2), "b": torch.ones(2)}
    expected = Measured(torch.ones(1, 3), [gradient], [torch.ones(1, 1)], {})
    found = dataclasses.replace(expected, gradients=[{**gradient, "a": torch.tensor([1.0, torch.nan])}])
    result = compare(found, expected)
    assert result.worst_parameter == "a" and not result.within(1.0)
    assert compare(expected, expected).within(0.0)


def test_gradients_are_put_together_and_disagreement_is_told() -> None:
    rows = torch.arange(12.0).view(6, 2)
    ranks: list[dict[str, GradientPiece]] = [
        {"head.weight": GradientPiece((3, 2), 0, 0, 0, rows[:2].flatten())},  # ZeRO cuts a shard anywhere
        {"head.weight": GradientPiece((3, 2), 0, 0, 4, rows[2:3].flatten())},
        {"head.weight": GradientPiece((3, 2), 0, 1, 0, rows[3:].flatten())},
    ]
    assert torch.equal(assemble(ranks, vocab_size=5)["head.weight"], rows[:5])
    ranks.append({"head.weight": GradientPiece((3, 2), 0, 1, 0, rows[3:].flatten() + 1)})
    with pytest.raises(RankError, match=r"rank 3 holds another gradient of head\.weight"):
        assemble(ranks, vocab_size=5)


def test_a_batch_that_micro_batches_do_not_divide(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["training.global_batch_size=9", "training.micro_batch_size=4"]
    assert run(config_file, "--layouts", "dp=3", "--batches", "1", *sizes) == 0, capsys.readouterr()


def test_a_vocabulary_of_one_token_has_neither_loss_nor_gradient() -> None:
    nothing = Measured(torch.zeros(1, 3), [{"a": torch.zeros(2)}], [torch.zeros(1, 1)], {})
    assert compare(nothing, nothing).within(0.0)


@pytest.mark.parametrize("text", ["tp=2:pp=2:dp=2:cp=2:sp=1:zero=1:acc=4:recompute=selective", "tp=1", "cp=4:zero=3"])
def test_a_layout_reads_as_it_is_written(text: str) -> None:
    assert parse_layout(str(parse_layout(text))) == parse_layout(text)


ODD_SIZES = st.fixed_dictionaries(
    {
        "num_layers": st.integers(2, 5),
        "num_attention_heads": st.sampled_from([2, 4, 6]),
        "head_width": st.integers(1, 7),
        "seq_length": st.sampled_from([4, 12, 20]),
        "vocab_size": st.integers(1, 300),
        "architecture": st.sampled_from([EREG, "SM+LN+G", "SM+ScFFN"]),
    }
)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ODD_SIZES, st.sampled_from(["tp=2:pp=2", "tp=2:sp=1:acc=3", "pp=2:dp=3:acc=1", "dp=2:cp=2:acc=3"]))
def test_odd_sizes(sizes: dict[str, Any], layout: str) -> None:
    _odd(sizes, parse_layout(layout))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ODD_SIZES, st.sampled_from(["tp=2:pp=2", "tp=2:sp=1:acc=3", "pp=2:dp=3:acc=1", "cp=2:tp=2", "tp=2:dp=3:zero=3"]))
def test_many_odd_sizes(sizes: dict[str, Any], layout: str) -> None:
    _odd(sizes, parse_layout(layout))


def _odd(sizes: dict[str, Any], layout: Layout) -> None:
    """Uneven stages, vocabularies smaller than a shard, heads of one feature; tp * cp divides the heads."""
    heads = sizes["num_attention_heads"] * (2 if layout.tp * layout.cp == 4 else 1)
    model = {name: value for name, value in sizes.items() if name != "head_width"}
    model.update(num_attention_heads=heads, hidden_size=heads * sizes["head_width"], ffn_hidden_size=2 * heads + 2)
    assert_layout(layout, "float64", global_batch_size=6, **model)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_context_of_32k_tokens() -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 32768}
    assert_layout(parse_layout("cp=2:acc=1"), "float32", global_batch_size=1, architecture=EREG, **model)
