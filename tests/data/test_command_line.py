"""Test that options reject values out of range (nan, infinity, too large) and output files without a folder."""

import argparse
from collections.abc import Callable

import pytest

from data import benchmark, index, inspect, prepare
from data.command_line import real_number, whole_number
from train import describe, evaluate, plan, private_inference
from train.compare import command as compare


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "-0.1", "2.1", "", "x", "9" * 5000])
def test_a_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r": expected a number from 0 to 2$"):
        real_number(0, 2)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "1.5", "0", "-1", "8", "", "x", "\u00b2", "9" * 5000])
def test_a_whole_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r": expected a whole number from 1 to 7$"):
        whole_number(1, 7)(text)


def test_bounds_are_within() -> None:
    assert [real_number(0, 2)(text) for text in ("0", "2", "1e-3")] == [0, 2, 0.001]
    assert [whole_number(1, 7)(text) for text in ("1", "7")] == [1, 7]


PREPARE = ["--input", "x", "--output", "y"]
INDEX = ["--address", "x", "--tokenizer", "y", "--output", "z"]
COMPARE = ["--config", "x", "--layouts", "tp=2"]


@pytest.mark.parametrize(
    ("main", "given", "option", "value"),
    [
        (prepare.main, PREPARE, "--vocab-size", "-1"),
        (prepare.main, PREPARE, "--vocab-size", "99999999999"),
        (prepare.main, PREPARE, "--shard-megabytes", "nan"),
        (prepare.main, PREPARE, "--shard-megabytes", "1e-9"),
        (prepare.main, PREPARE, "--tokenizer-megabytes", "1e300"),
        (prepare.main, PREPARE, "--max-megabytes", "inf"),
        (prepare.main, PREPARE, "--validation-fraction", "1"),
        (prepare.main, PREPARE, "--workers", "0"),
        (index.main, INDEX, "--workers", "0"),
        (inspect.main, ["x"], "--step", "0"),
        (inspect.main, ["x"], "--sample", "-1"),
        (inspect.main, ["x"], "--sample", "1" + "0" * 29),
        (inspect.main, ["x"], "--seq-length", "0"),
        (inspect.main, ["x"], "--global-batch-size", "0"),
        (inspect.main, ["x"], "--window-shards", "0"),
        (benchmark.main, [], "--tokens", "nan"),
        (benchmark.main, [], "--tokens", "-5"),
        (benchmark.main, [], "--seconds", "nan"),
        (benchmark.main, [], "--shards", "0"),
        (compare.main, COMPARE, "--tolerance", "nan"),
        (compare.main, COMPARE, "--tolerance", "-1"),
        (compare.main, COMPARE, "--batches", "0"),
        (compare.main, COMPARE, "--json", "no/folder/lines.jsonl"),
        (compare.main, COMPARE, "--json", "."),
        (evaluate.main, ["--run", "x"], "--samples", "0"),
        (evaluate.main, ["--run", "x"], "--samples", "-5"),
        (private_inference.main, ["--config", "x"], "--vocab-size", "0"),
        (private_inference.main, ["--config", "x"], "--vocab-size", "-5"),
        (plan.main, ["--config", "x"], "--layouts", "-3"),
    ],
)
def test_every_command_refuses_such_an_option(
    main: Callable[[list[str]], object], given: list[str], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*given, option, value])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: {value!r}: expected a" in said


@pytest.mark.parametrize(
    ("main", "given", "words"),
    [
        (describe.main, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (private_inference.main, ["--vocab-size", "9"], "overrides and --vocab-size need --config"),
        (private_inference.main, ["model.num_layers=6"], "overrides and --vocab-size need --config"),
    ],
)
def test_what_would_be_ignored_is_refused(
    main: Callable[[list[str]], object], given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert caught.value.code == 2 and words in capsys.readouterr().err
