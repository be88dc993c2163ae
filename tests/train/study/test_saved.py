"""A file of finished results counts where its configuration is the suite's, and is refused where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.study.saved_results import write_results, write_suite
from train.study.__main__ import main
from train.study.outcome import outcome_from
from train.study.reading import spread, thinned
from train.study.runner import Clock
from train.study.saved import load_results, with_results
from train.study.suite import SuiteError, load_suite

RUNS = [{"name": "a"}, {"name": "b"}]
HALVES = {"loss": 4.0, "halves": [4.1, 3.9]}


def saved(folder: Path, **change: Any) -> tuple[Path, Path]:
    """Write a suite and its results, the first of which is changed."""
    suite = write_suite(folder, runs=RUNS)
    file = write_results(folder / "results.json", suite, lambda run: {**HALVES, "detail": "x"})
    tree = json.loads(file.read_text())
    tree["results"][0].update(change)
    file.write_text(json.dumps(tree))
    return suite, file


def test_a_saved_result_counts_as_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, file = saved(tmp_path)
    assert main(["run", str(suite), "--results", str(file)]) == 0
    assert capsys.readouterr().out.count("done, validation loss 4.0000") == 2
    assert main(["slurm", str(suite), "--results", str(file)]) == 0
    assert "nothing to submit" in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*/seed*"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate is 0.001 in {file} and 0.5 here"),
        ("training.train_steps=13", "training.train_steps is 12 in {file} and 13 here"),
        ("model.num_layers=3", "model.num_layers is 2 in {file} and 3 here"),
    ],
)
def test_a_result_of_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    suite, file = saved(tmp_path)
    words = words.format(file=file)
    for command in (["run"], ["results", "--output", str(tmp_path / "again.json")]):
        assert main([*command, str(suite), override, "--results", str(file)]) == 2
        assert f"error: a/seed1: {words}; leave that file out" in capsys.readouterr().err
    assert main(["status", str(suite), override, "--results", str(file)]) == 0
    assert capsys.readouterr().out.count("  other ") == 2


def test_results_on_other_data_are_refused(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, file = saved(tmp_path, fingerprint="0" * 64)
    assert main(["run", str(suite), f"data.path={dataset}", "--results", str(file)]) == 2
    assert "was made with other data than" in capsys.readouterr().err
    assert main(["run", str(suite), "--results", str(file)]) == 0, "data that is not here is assumed to be the same"


def test_files_that_contradict_each_other_or_the_suite_are_told(tmp_path: Path) -> None:
    suite, file = saved(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(file.read_text())
    assert with_results(load_suite(suite), [file, other]).runs[0].stages[0].saved is not None
    other.write_text(file.read_text().replace('"loss": 4.0', '"loss": 5.0'))
    with pytest.raises(SuiteError, match=f"other.json: a/seed1 has another result in {file}; leave one of them out"):
        with_results(load_suite(suite), [file, other])
    fewer = write_suite(tmp_path, runs=RUNS[:1])
    with pytest.raises(SuiteError, match=r'results.json: "b/seed1" is no run of the suite'):
        with_results(load_suite(fewer), [file])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"word": "partial"}, 'word is "partial" and loss 4.0, expected done with a loss'),
        ({"word": "diverged"}, 'word is "diverged" and loss 4.0'),
        ({"loss": None}, 'word is "done" and loss null'),
        ({"loss": "low"}, 'loss is "low", expected a number or null'),
        ({"step": True}, "step is true, expected a whole number"),
        ({"halves": [1.0]}, "halves has 1 numbers, expected 2"),
        ({"config": {}}, "config.model is missing"),
        ({"validation": {"tokens": [1], "loss": []}}, "validation has lists of 0 and 1, expected equal lengths"),
        ({"layers": {"step": [1], "entropy_nats": [["x"]]}}, r'layers.entropy_nats\[0\]\[0\] is "x"'),
        ({"heads": {"step": 1, "entropy_nats": [[1], [1, 2]], "threshold": None}}, "has lines of several lengths"),
        (
            {"heads": {"step": 1, "entropy_nats": [[1]], "threshold": [3]}},
            r"heads.threshold\[0\] is 3, expected a list",
        ),
        ({"training": {}}, "training.steps is missing"),
        ({"vocab_size": -1}, "vocab_size is -1, expected a whole number from 0"),
        ({"layers": {"step": [], "entropy_nats": []}}, "layers has empty lists; write null instead"),
    ],
)
def test_damaged_results_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    suite, file = saved(tmp_path, **change)
    with pytest.raises(SuiteError, match=rf"results.json: results\[0\]: .*{words}.*; write the file again"):
        load_results(file)
    assert main(["status", str(suite), "--results", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: results[0]: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("{}", "format is missing"),
        ('{"format": "x", "version": 1, "results": []}', 'its format is "x" 1, expected "study-results" 1'),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_file_of_results_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SuiteError, match=words):
        load_results(file)


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    for outcome in load_results(file):
        assert outcome_from(json.loads(json.dumps(outcome.as_row()))) == outcome


def test_rows_are_thinned_to_the_last(tmp_path: Path) -> None:
    assert thinned(7, 10) == list(range(7)) and thinned(0, 10) == []
    assert thinned(100, 4) == [24, 49, 74, 99]
    assert spread(1, 20) == [0] and spread(3, 20) == [0, 1, 2]
    assert spread(1000, 4) == [0, 9, 99, 999]


def test_a_run_that_cannot_end_in_time_is_not_started(tmp_path: Path) -> None:
    """Known from the slowest finished run of its size and length; in part, for one that resumes."""
    runs = [{"name": "a"}, {"name": "b"}, {"name": "wide", "config": {"model": {"hidden_size": 64}}}]
    stages = [run.stages[0] for run in load_suite(write_suite(tmp_path, runs=runs)).runs]
    clock = Clock(float("inf"))
    assert clock.needed_s(stages[1], 0) == 0, "nothing is known yet"
    clock.note(stages[0], 0, 24.0)
    clock.note(stages[0], 6, 6.0)
    assert [clock.needed_s(stage, 0) for stage in stages] == [24.0, 24.0, 0.0]
    assert clock.needed_s(stages[1], 9) == 6.0
