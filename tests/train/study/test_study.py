"""A study runs its suite, goes on where it was stopped, records what diverged, and reports it."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from unittest.mock import Mock

import numpy as np
import pytest

from tests.conftest import TINY, prepare_sources
from train.config import Config
from train.run.directory import RunDirectory
from train.run.reader import RunReader
from train.scaling.__main__ import main as scaling
from train.scaling.points import PointsError
from train.scaling.source import load_series
from train.study.__main__ import main, parse
from train.study.launch import forked
from train.study.reading import largest_rise
from train.study.regularizer import suites, text_of
from train.study.report.pictures import ParetoPoint, undominated
from train.study.report.table import _baseline, gap_text, relative
from train.study.results import Group, records
from train.study.stages import branch_off, prepare
from train.study.state import next_stage, read_state
from train.study.suite import SuiteError, load_suite, merged

SECTIONS = {key: dict(TINY[key]) for key in ("model", "regularizer", "checkpoint", "logging")}


TOO_FAST = {"learning_rate": 1e4, "warmup_steps": 0}


def write_suite(folder: Path, runs: list, dataset: Path | str = "nowhere", **keys: object) -> Path:
    base = {**SECTIONS, "data": {"path": str(dataset), "planned_vocab_size": 400}, "training": {**TINY["training"]}}
    file = folder / "suite.json"
    tree = {"name": "tiny", "output": str(folder / "runs"), "base": base, "runs": runs, **keys}
    file.write_text(json.dumps(tree))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A suite run to its end: two seeds of a row of the paper, a model that diverges, a branched run."""
    folder = tmp_path_factory.mktemp("study")
    runs = [
        {"rows": "codeparrot-12L-T128.EReg"},
        {"rows": "codeparrot-12L-T128.SM+LN+G"},
        {"name": "lost", "config": {"model": {"architecture": "SM"}, "optimizer": TOO_FAST}},
        {"name": "branched", "budgets_tokens": [8 * 32 * 10, 8 * 32 * 20]},
    ]  # fmt: skip
    file = write_suite(folder, runs, dataset, seeds=[1, 2])
    assert main(["run", str(file), "--jobs", "2"]) == 0
    return file


def test_every_run_reaches_its_end(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    states = {(row["label"], row["seed"], row["planned_tokens"]): row["state"] for row in rows}
    assert len(states) == 2 * 5
    assert {state for (label, *_), state in states.items() if label != "lost"} == {"done"}
    assert states["lost", 1, 8 * 32 * 12] == "diverged"
    lost = next(row for row in rows if row["label"] == "lost")
    assert lost["validation_loss"] is None
    assert ": the loss is nan" in lost["detail"] and "NaN heads, first in layer" in lost["detail"]
    assert all(row["communication_gb"] > 0 and row["training_flops"] > 0 for row in rows if row["label"] != "lost")


def test_what_is_done_is_not_done_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.parent / "runs" / "lost" / "seed1"
    before = (folder / "log.txt").stat().st_mtime_ns
    assert main(["run", str(finished), "--only", "lost"]) == 0
    assert "diverged" in capsys.readouterr().out and (folder / "log.txt").stat().st_mtime_ns == before
    assert main(["run", str(finished), "--only", "nobody"]) == 2


def test_another_configurations_results_are_not_the_suites(
    finished: Path, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_sources(tmp_path / "other", 360)
    capsys.readouterr()
    wider = [str(finished), "optimizer.learning_rate=0.5"]
    assert main(["run", *wider]) == main(["slurm", *wider]) == 2
    out, errors = capsys.readouterr()
    assert not out and errors.count("\n") == 2 and errors.count("; give the suite another folder: output=DIR") == 2
    for override, there, here in (
        ("model.num_layers=3", "model.num_layers is 2 in ", " and 3 here"),
        (f"data.path={tmp_path}/other", "data.path is '", "/other', which holds other data, here"),
        ("training.train_steps=6", "training.train_steps is at least 12 in ", " and 6 here"),
    ):
        assert main(["status", str(finished), "--json", override]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[0])
        assert (row["state"], row["validation_loss"], row["tokens"]) == ("other", None, 0)
        assert there in row["detail"] and here in row["detail"]
    assert main(["report", "--output", str(tmp_path), str(finished), "model.num_layers=3"]) == 0
    assert "(10 other)" in (tmp_path / "report.md").read_text() and not list((tmp_path / "pictures").iterdir())
    series = load_series(finished, "total", overrides=["model.num_layers=3"])
    assert all(not len(one.points) and ": other" in one.left_out[0] for one in series)
    shutil.copytree(dataset, tmp_path / "moved")
    for where in (f"{tmp_path}/moved", "nowhere"):
        assert read_state(load_suite(finished, [f"data.path={where}"]).runs[0].stages[0]).word == "done"
    longer = load_suite(finished, ["training.train_steps=20", "logging.interval=1", "health.window=9"])
    assert read_state(longer.runs[0].stages[0]).word == "partial"


def test_a_branch_is_the_run_its_own_schedule_would_have_been(finished: Path, tmp_path: Path, dataset: Path) -> None:
    """Against one uninterrupted run with a 'wsd' schedule of the branch's length, step by step."""
    branch = load_suite(finished).runs[-2].stages[1].config
    assert branch.train_steps == 10 and branch.optimizer.schedule == "wsd"
    tree = branch.as_dict()
    sections = {
        key: tree[key] for key in ("model", "regularizer", "data", "optimizer", "training", "checkpoint", "logging")
    }
    file = write_suite(tmp_path, [{"name": "whole", "config": sections}], dataset)
    assert main(["run", str(file)]) == 0
    whole = RunReader(tmp_path / "runs" / "whole" / "seed1").metrics()
    mine = RunReader(Path(branch.run_dir)).metrics()
    times = {"step_time_s", "tokens_per_second", "data_wait_s", "mfu", "goodput"}
    kept = [{key: value for key, value in row.items() if key not in times} for row in mine if "loss" in row]
    expected = [{key: value for key, value in row.items() if key not in times} for row in whole if "loss" in row]
    assert len(kept) == 10 and kept == expected
    assert mine[-1]["validation_loss"] == whole[-1]["validation_loss"]


def test_the_trunk_goes_on_from_where_the_first_branch_left_it(finished: Path) -> None:
    stages = load_suite(finished).runs[-2].stages
    assert [(stage.folder.name, stage.config.train_steps, stage.is_result) for stage in stages] == [
        ("trunk", 8, False), ("tokens2560", 10, True), ("trunk", 16, False), ("tokens5120", 20, True),
    ]  # fmt: skip
    rates = [row["learning_rate"] for row in RunReader(stages[2].folder).metrics() if "loss" in row]
    assert len(rates) == 16 and len(set(rates[1:])) == 1, "the trunk's rate stays at the peak"
    long = [row["step"] for row in RunReader(stages[3].folder).metrics() if "loss" in row]
    assert long == list(range(1, 21))


def test_a_stopped_branch_is_neither_copied_over_nor_lost(finished: Path, tmp_path: Path) -> None:
    stage = load_suite(finished).runs[-2].stages[1]
    before = sorted(path.name for path in (stage.folder / "checkpoints").iterdir())
    branch_off(stage)
    assert sorted(path.name for path in (stage.folder / "checkpoints").iterdir()) == before


@pytest.fixture
def copied(finished: Path, tmp_path: Path, dataset: Path) -> Path:
    """A suite of the branched run's first seed alone, with a budget added between the two that are done."""
    source = load_suite(finished).runs[-2].stages[0].folder.parent
    shutil.copytree(source, tmp_path / "runs" / "branched" / "seed1")
    return write_suite(tmp_path, [{"name": "branched", "budgets_tokens": [2560, 3840, 5120]}], dataset)


def test_a_budget_between_and_a_branch_begun_anew_find_the_trunks_checkpoints(copied: Path) -> None:
    trunk, first = load_suite(copied).runs[0].stages[:2]
    assert trunk.config.checkpoint.keep == 3
    lost = first.folder / "metrics.jsonl"
    before = read_state(first).loss
    lost.write_text('{"step": 9, "loss": null}\n')
    shutil.rmtree(trunk.folder / "checkpoints" / "step_00000008", ignore_errors=True)
    assert main(["run", str(copied), "--retry"]) == 0
    assert read_state(first).loss == before, "with or without the trunk's checkpoint it is the same run"
    assert [record.state.word for record in records(load_suite(copied))] == ["done"] * 3


def test_a_branch_that_diverged_does_not_end_the_trunk(copied: Path) -> None:
    (run,) = load_suite(copied).runs
    (run.stages[1].folder / "metrics.jsonl").write_text('{"step": 9, "loss": null}\n')
    assert read_state(run.stages[1]).word == "diverged" and next_stage(run) == run.stages[3]
    assert main(["run", str(copied)]) == 0
    assert read_state(run.stages[3]).word == "done"


def test_a_kill_while_branching_off_loses_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_suite(copied).runs[0].stages[3]
    stage.folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", Mock(side_effect=KeyboardInterrupt))
        branch_off(stage)
    branch_off(stage)
    assert RunReader(stage.folder).complete_steps() == [12] and RunReader(stage.folder).entropies()


@pytest.mark.parametrize(
    ("name", "content", "word", "detail"),
    [
        ("metrics.jsonl", b"\xff\xfe", "failed", "metrics.jsonl: no line of it is a row"),
        ("metrics.jsonl", b'{"step": 1e400, "loss": 3.0}', "failed", "metrics.jsonl: no line of it is a row"),
        ("metrics.jsonl", b'{"step": 20, "validation_loss": NaN}', "diverged", "not finite"),
        ("metrics.jsonl", b'{"step": 20, "validation_loss": "low"}', "failed", 'metrics.jsonl: step 20: valid.* "low"'),
        ("metrics.jsonl", b'{"step": 2, "loss": [1]}', "failed", r"metrics.jsonl: step 2: loss is \[1\], expected"),
        ("metrics.jsonl", None, "failed", "metrics.jsonl"),
        ("run.lock", None, "failed", "run.lock"),
        ("config.json", b"{", "failed", "config.json: damaged"),
        ("config.json", b'{"vocab_size": true, "config": {"model": 3}}', "failed", "config.model is 3"),
        ("failure.txt", b"error: step 3: \xff", "diverged", "step 3"),
        ("entropy.jsonl", b'{"step": 1}\n{"step": 2, "entropy_nats": [3]}', "diverged", "step 3"),
    ],
)  # fmt: skip
def test_a_damaged_file_fails_its_run_alone(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, word: str, detail: str
) -> None:
    """None: a folder lies where the file belongs."""
    folder = load_suite(copied).runs[0].stages[-1].folder
    if word == "diverged":
        (folder / "metrics.jsonl").write_text('{"step": 3, "loss": null}\n')
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    assert main(["status", str(copied), "--json"]) == 0
    states = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert states[0]["state"] == "done"
    assert states[-1]["state"] == word and re.search(detail, states[-1]["detail"])


def test_a_report_lacks_what_is_damaged(copied: Path, tmp_path: Path) -> None:
    folder = load_suite(copied).runs[0].stages[-1].folder
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "tokens": 5120, "ce_loss": "low", "entropy_loss": 0}\n')
    (tmp_path / "runs" / "environment.json").write_text("{}")
    assert main(["report", str(copied)]) == 0
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "1 new" in text and "Trained on" not in text


def test_a_study_goes_on_from_a_file_of_results_and_reports_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders are gone. Two results of the ten were not in the file, since the machine was taken before."""
    file, half = tmp_path / "done.json", tmp_path / "half.json"
    assert main(["results", str(finished), "--output", str(file)]) == 0
    assert "10 finished results" in capsys.readouterr().out and file.stat().st_size < 10 * 6000
    tree = json.loads(file.read_text())
    lacking = ("lost/seed2", "branched/seed2/tokens5120")
    tree["results"] = [row for row in tree["results"] if row["run"] not in lacking]
    half.write_text(json.dumps(tree))
    fresh = [str(finished), f"output={tmp_path}/fresh"]
    assert main(["status", *fresh, "--results", str(half), "--json"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(states) == ["diverged"] + ["done"] * 7 + ["new"] * 2
    assert main(["run", *fresh, "--results", str(half)]) == 0
    starts = [line.split(": ")[0].split("] ")[1] for line in capsys.readouterr().out.splitlines() if "starts" in line]
    assert starts == ["lost/seed2", "branched/seed2 trunk", "branched/seed2 tokens5120"]
    whole = tmp_path / "whole.json"
    assert main(["results", *fresh, "--results", str(half), "--output", str(whole)]) == 0
    reports = []
    for name, words in (("first", [str(finished)]), ("again", [*fresh, "--results", str(half)]),
                        ("saved", [str(finished), f"output={tmp_path}/none", "--results", str(whole)])):  # fmt: skip
        assert main(["report", *words, "--output", str(tmp_path / name)]) == 0
        reports.append((tmp_path / name / "report.md").read_text())
        assert len(list((tmp_path / name / "pictures").iterdir())) == 8
    assert reports[0] == reports[1] == reports[2]


def test_a_divergence_in_a_file_is_a_result_until_it_is_retried(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "done.json"
    assert main(["results", str(finished), "--output", str(file)]) == 0
    fresh = [str(finished), f"output={tmp_path}/fresh", "--only", "lost/seed1", "--results", str(file)]
    assert main(["run", *fresh]) == 0
    assert "lost/seed1: diverged (step" in capsys.readouterr().out and not (tmp_path / "fresh" / "lost").exists()
    assert main(["run", *fresh, "--retry"]) == 0
    assert "lost/seed1: starts" in capsys.readouterr().out


def test_the_report_holds_tables_and_pictures(finished: Path, tmp_path: Path) -> None:
    assert main(["report", str(finished), "--output", str(tmp_path / "report"), "--note", "A tiny trial."]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "A tiny trial." in text and "| 3.21 |" in text and "+19.3%" in text, "published: 3.21 against 2.69"
    assert "lost, seed 1" in text and ": the loss is nan" in text
    pictures = {path.stem for path in (tmp_path / "report" / "pictures").iterdir()}
    assert pictures >= {
        "head_maps",
        "layer_entropies",
        "head_shares",
        "thresholds",
        "validation_loss",
        "pareto",
        "nan_counts",
    }
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(pictures) and 'src="pictures' not in html


def test_points_for_scaling_laws_come_from_what_finished(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = {one.points.name: one for one in load_series(finished, "total")}
    ereg = series["EReg(SM(t)+ScFuFFN)"]
    assert sorted(set(ereg.points.tokens)) == [8 * 32 * 10, 8 * 32 * 12, 8 * 32 * 20]
    assert len(series["SM"].points) == 0 and "diverged" in series["SM"].left_out[0]
    assert ereg.communication_gb is not None and ereg.communication_gb(np.array([1e6])) > 0
    elsewhere = load_series(finished, "total", overrides=["data.path=nowhere", "data.planned_vocab_size=7"])
    sizes = {one.points.name: list(one.points.parameters) for one in elsewhere}
    assert sizes == {name: list(one.points.parameters) for name, one in series.items()}, "a run notes its vocabulary"
    not_begun = ["data.path=nowhere", "data.planned_vocab_size=null", f"output={tmp_path}"]
    assert scaling(["fit", str(finished), "--resamples", "5", *not_begun]) == 2
    assert "its parameters cannot be counted" in capsys.readouterr().err
    with pytest.raises(PointsError, match="only a suite takes overrides"):
        load_series(Path("points.csv"), "total", overrides=["a.b=1"])


def test_intervals_over_seeds_are_students(finished: Path) -> None:
    group = Group(tuple(record for record in records(load_suite(finished)) if record.label.endswith("EReg")))
    values = group.perplexities
    spread = group.mean_and_half_width()
    assert spread is not None and spread[0] == pytest.approx(sum(values) / 2)
    assert spread[1] == pytest.approx(12.706 * abs(values[0] - values[1]) / 2, rel=1e-3)  # t of 1 degree of freedom
    baseline = Group(tuple(record for record in records(load_suite(finished)) if record.label.endswith("SM+LN+G")))
    first, second = (mine / theirs - 1 for mine, theirs in zip(values, baseline.perplexities, strict=True))
    half = 12.706 * abs(first - second) / 2
    assert gap_text(group, baseline) == f"{(first + second) / 2:+.1%} ± {half:.1%}" and gap_text(group, None) == "-"
    assert _baseline(group, [group, baseline], "SM+LN+G") is baseline
    for change in ({"data": "elsewhere"}, {"vocab_size": 401}):
        other = Group(tuple(replace(record, **change) for record in baseline.records))
        assert _baseline(group, [group, other], "SM+LN+G") is None, "losses on other tokens are not compared"
    assert relative(3.21, 2.69) == "+19.3%" and relative(None, 2.69) == "-"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": []}, r"runs = \[\] must be a list of objects with at least one"),
        ({"runs": [3]}, "runs = .3. must be a list of objects"),
        *(({"base": base}, "base = .* must be an object of sections") for base in ([], None, "x", {"training": 5})),
        *(({"output": output}, "output = .* must be a folder") for output in (3, [], None, "")),
        *(({"name": name}, "name = .* must be a word") for name in (3, None, "../x")),
        *(({"runs": [{"name": "a", "config": tree}]}, r"runs\[0\]: config = .* an object") for tree in ([], None)),
        *(({"runs": [{"name": n}]}, r"runs\[0\]: name = .* a word") for n in ("", "/abs", "../../x", "b/seed1/trunk")),
        *(
            ({"runs": [{"name": "a", "budgets_tokens": [budget]}]}, r"runs\[0\]: budgets_tokens = .* token counts")
            for budget in (True, "1")
        ),
        *(({"runs": [{"name": "a", "budgets_tokens": [float(b)]}]}, "is not JSON") for b in ("inf", "nan")),
        *(({"runs": [{"rows": rows}]}, r"runs\[0\]: rows = .* a name or a list") for rows in ([], [3], None)),
        ({"runs": [{"rows": "Table 99"}]}, "'Table 99' is unknown"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs are called a/seed1"),
        (
            {"runs": [{"name": "a", "config": {"model": {"num_layer": 3}}}]},
            r"runs\[0\] a: model.num_layer is no known key",
        ),
        ({"runs": [{"name": "a", "rows": "SM"}]}, "set either rows"),
        ({"runs": [{"name": "a", "budgets_tokens": [0]}]}, "must be a list of token counts"),
        *(
            ({"runs": [{"name": "a", "sweep": sweep}]}, r"runs\[0\]: sweep = .* must be lists of values by key")
            for sweep in ({}, [1], {"optimizer": [1]}, {"optimizer.learning_rate": []}, {"model.norm": ["a/b"]})
        ),
        (
            {"runs": [{"name": "a", "sweep": {"optimizer.learning_rat": [1]}}]},
            r"runs\[0\] a-learning_rat1: optimizer.learning_rat is no known key",
        ),
        ({"seeds": "1"}, 'seeds = "1" must be a list of whole numbers'),
        ({"seeds": [True]}, "seeds = .true. must be a list of whole numbers"),
        ({"extra": 1}, "'extra' is no known key"),
    ],
)
def test_faults_of_a_suite_are_told(tmp_path: Path, change: dict, words: str) -> None:
    file = write_suite(tmp_path, [{"name": "a"}])
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SuiteError, match=words):
        load_suite(file)
    assert main(["status", str(file)]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "a", "name": "b"}', "name is given twice"),
        ("[" * 100_000, "brackets within brackets"),
        ("[]", "expected a JSON object"),
        ("{}", "name is missing; expected a word"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_suite_is_told(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "suite.json"
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(SuiteError, match=words):
        load_suite(file)


@pytest.mark.parametrize("override", ["output=5", "output=", "training=5", "run_dir=runs/x", "seeds"])
def test_faulty_overrides_of_a_suite_are_told(tmp_path: Path, override: str) -> None:
    with pytest.raises(SuiteError, match=r"must be a folder|must be an object of sections|not of the form"):
        load_suite(write_suite(tmp_path, [{"name": "a"}]), [override])


def test_a_sweep_is_a_run_for_each_combination(tmp_path: Path) -> None:
    sweep = {"optimizer.learning_rate": [5e-4, 0.001], "model.temperature": ["none", "per_head"]}
    runs = load_suite(write_suite(tmp_path, [{"name": "a", "sweep": sweep}, {"name": "b"}])).runs
    found = {run.label: (run.arm, run.swept, run.stages[0].config) for run in runs}
    assert list(found) == [
        "a-learning_rate0.0005-temperaturenone",
        "a-learning_rate0.0005-temperatureper_head",
        "a-learning_rate0.001-temperaturenone",
        "a-learning_rate0.001-temperatureper_head",
        "b",
    ]
    arm, swept, config = found["a-learning_rate0.0005-temperatureper_head"]
    assert arm == "a" and swept == {"optimizer.learning_rate": 5e-4, "model.temperature": "per_head"}
    assert config.optimizer.learning_rate == 5e-4 and config.model.temperature == "per_head"
    assert found["b"][:2] == ("b", {})


def test_runs_are_chosen_by_name_in_the_order_given(tmp_path: Path) -> None:
    arm = {"name": "a", "sweep": {"optimizer.learning_rate": [5e-4, 0.001]}}
    file = write_suite(tmp_path, [arm, {"name": "b"}])
    file.write_text(json.dumps({**json.loads(file.read_text()), "seeds": [1, 2]}))
    suite = load_suite(file)
    slow, fast = "a-learning_rate0.0005", "a-learning_rate0.001"
    assert [run.name for run in suite.chosen([])] == [f"{n}/seed{s}" for s in (1, 2) for n in (slow, fast, "b")]
    chosen = [run.name for run in suite.chosen(["b/seed2", fast, "a"])]
    assert chosen == ["b/seed2", f"{fast}/seed1", f"{fast}/seed2", f"{slow}/seed1", f"{slow}/seed2"]


def test_a_run_that_cannot_start_says_why_and_the_others_go_on(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [{"name": "bad", "config": {"data": {"path": str(tmp_path / "missing")}}}, {"name": "good"}]
    file = write_suite(tmp_path, runs, dataset)
    assert main(["run", str(file)]) == 1
    out = capsys.readouterr().out
    assert "bad/seed1: failed" in out and "missing" in out and "good/seed1: done" in out


def test_a_time_limit_ends_what_runs(tmp_path: Path, dataset: Path) -> None:
    file = write_suite(tmp_path, [{"name": "long", "config": {"training": {"train_steps": 10**6}}}], dataset)
    assert main(["run", str(file), "--time-limit", "8"]) == 1
    stage = load_suite(file).runs[0].stages[0]
    assert read_state(stage).word in ("partial", "new")
    shutil.rmtree(stage.folder)


def test_a_study_asked_to_end_has_its_training_save_and_end(tmp_path: Path, dataset: Path) -> None:
    file = write_suite(tmp_path, [{"name": "long", "config": {"training": {"train_steps": 10**6}}}], dataset)
    stage = load_suite(file).runs[0].stages[0]
    study = subprocess.Popen([sys.executable, "-m", "train.study", "run", str(file)], stderr=subprocess.PIPE, text=True)
    while study.poll() is None and read_state(stage).step < 8:
        time.sleep(0.1)
    os.kill(study.pid, signal.SIGTERM)  # it alone
    errors = study.communicate(timeout=60)[1]
    state = read_state(stage)
    last = errors.splitlines()[-1]  # a CUDA build of torch warns of a missing GPU first
    assert study.returncode == 1 and last.startswith("stopped; the same command goes on")
    assert state.word == "partial" and state.step in RunReader(stage.folder).complete_steps()


def test_a_look_at_a_run_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    with (tmp_path / "run.lock").open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert not RunReader(tmp_path).is_training()
        Timer(0.2, look.close).start()
        directory = RunDirectory(tmp_path, Config())
    assert RunReader(tmp_path).is_training()
    directory.close()


def test_a_run_that_another_process_trains_is_not_finished(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_suite(tmp_path, [{"name": "a"}], dataset)
    (folder := tmp_path / "runs" / "a" / "seed1").mkdir(parents=True)
    with (folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["run", str(file)]) == 1
    assert "running (another process trains it)" in capsys.readouterr().out


def test_an_array_job_trains_the_next_stage_of_every_run(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_suite(tmp_path, [{"name": "a"}, {"name": "b", "budgets_tokens": [2560, 5120]}], dataset)
    assert main(["slurm", str(file)]) == 0
    a, b = tmp_path / "runs" / "a" / "seed1", tmp_path / "runs" / "b" / "seed1"
    expected = f"sbatch --array=0-1 slurm/sweep.sh {a}/stage.json {b}/trunk/stage.json"
    assert capsys.readouterr().out.strip() == expected
    assert main(["run", str(file), "--only", "a"]) == 0
    for stage in load_suite(file).runs[1].stages[:1]:
        assert forked(["--config", str(prepare(stage))], stage.folder / "log.txt", lambda: False) == 0
    capsys.readouterr()
    assert main(["slurm", str(file)]) == 0
    assert capsys.readouterr().out.strip() == f"sbatch --array=0-0 slurm/sweep.sh {b}/tokens2560/stage.json"
    assert (b / "tokens2560" / "checkpoints" / "step_00000008" / "checkpoint.json").exists()


def test_overrides_stand_anywhere_on_the_command_line() -> None:
    options = parse(["run", "suite.json", "a.b=1", "--jobs", "3", "c.d=2", "--retry", "e.f=3"])
    assert options.overrides == ["a.b=1", "c.d=2", "e.f=3"] and options.jobs == 3 and options.retry
    with pytest.raises(SystemExit):
        parse(["run", "suite.json", "--job", "3", "--again"])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--launcher", "deepspeed 'x", "No closing quotation; expected a command"),
        ("--launcher", "no-such-launcher --x 1", "no command 'no-such-launcher' is found here"),
        ("--time-limit", "nan", "'nan': expected a number from 0"),
        ("--time-limit", "-5", "'-5': expected a number from 0"),
        ("--jobs", "0", "'0': expected a whole number from 1"),
    ],
)
def test_faulty_options_are_told(option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "suite.json", option, value])
    assert ended.value.code == 2 and f"argument {option}: " in (told := capsys.readouterr().err) and words in told


def test_a_reader_that_has_seen_enough_ends_a_command_quietly() -> None:
    """`true` reads nothing and is gone before the first line."""
    command = f"{sys.executable} -m train.study status configs/suites/paper.json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_later_trees_win_and_lengths_replace_each_other() -> None:
    tree = merged(
        {"training": {"train_tokens": 5, "seed": 1}, "model": {"num_layers": 1}}, {"training": {"train_steps": 7}}
    )
    assert tree == {"training": {"train_steps": 7, "seed": 1}, "model": {"num_layers": 1}}


def test_the_front_is_what_nothing_beats() -> None:
    points = [ParetoPoint(*values) for values in (("a", 1.0, 5.0), ("b", 2.0, 6.0), ("c", 3.0, 4.0), ("d", 1.0, 5.5))]
    assert [point.name for point in undominated(points)] == ["a", "c"]


def test_the_largest_rise_is_over_what_came_before() -> None:
    losses = [5.0, 4.0, 6.9, 4.0, 3.0, np.nan, 9.0]
    rise, place = largest_rise(losses)
    assert (rise, place) == (pytest.approx(6.9 - 4.9), 2)
    assert largest_rise([3.0, 2.0, 1.0]) == (0.0, 0)


@pytest.mark.parametrize("file", sorted(Path("configs/suites").rglob("*.json")), ids=lambda file: file.stem)
def test_shipped_suites_load(file: Path) -> None:
    assert load_suite(file).runs


def test_shipped_suites_of_the_regularizer_are_those_of_the_table() -> None:
    shipped = {file.stem: file.read_text() for file in Path("configs/suites/regularizer").glob("*.json")}
    assert shipped == {name: text_of(suite) for name, suite in suites().items()}
