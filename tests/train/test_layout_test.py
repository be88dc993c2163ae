"""The layout test: which runs it makes, what it says of them, and that it fails what it must."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from parallel.layout import Layout, parse_layout
from train.config import load_config, world_faults
from train.layout_test import __main__ as command
from train.layout_test.cases import ARITHMETICS, LAYOUTS, Case, cases
from train.layout_test.launch import Job, run_all
from train.layout_test.results import Trained, judge

TRUTH = Trained({"layers.0.a": torch.ones(4), "layers.1.a": torch.ones(4), "b": torch.ones(1)}, [3.0, 2.0], 1.0)


def moved(by: float, losses: float = 0.0, **others: torch.Tensor) -> Trained:
    """The truth with every moment and loss off by as much."""
    moments = {name: moment + by for name, moment in TRUTH.moments.items()}
    return Trained({**moments, **others}, [loss + losses for loss in TRUTH.losses], 1.0)


BASELINE = moved(0.01, losses=0.02)


def test_what_one_process_rounds_a_layout_may() -> None:
    verdict = judge(moved(0.012, losses=0.03), TRUTH, BASELINE)
    assert verdict.passed and verdict.words == "ok"
    assert verdict.gradient_limit == pytest.approx(1.5 * 0.01 + 2**-8)
    assert verdict.loss_error_nats == pytest.approx(0.01) and verdict.loss_limit_nats == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (moved(0.03), "BEYOND"),
        (moved(0.01, losses=0.05), "BEYOND"),
        (moved(0.01, **{"layers.1.a": torch.zeros(4)}), "LOST layers.1.a"),
        (moved(0.01, b=torch.tensor([torch.nan])), "LOST b"),
        (dataclasses.replace(BASELINE, moments={"b": torch.ones(1)}), "LOST layers.{0,1}.a"),
    ],
)
def test_what_fails(found: Trained, words: str) -> None:
    verdict = judge(found, TRUTH, BASELINE)
    assert not verdict.passed and verdict.words == words


@pytest.mark.parametrize("devices", LAYOUTS)
def test_every_run_is_one_that_can_be_trained(devices: int, tmp_path: Path) -> None:
    options = command.parse(["--devices", str(devices)])
    chosen = cases(devices)
    assert max(case.layout.world_size for case in chosen) == devices
    names = [case.name for case in chosen]
    assert len(set(names)) == len(names)
    for case in chosen:
        job = command.job(case, options, tmp_path)  # refuses what does not fit
        config = load_config(job.arguments[1], job.arguments[2:])
        assert not world_faults(config, job.processes)
        assert config.num_micro_batches(job.processes) == 2
        assert (config.training.precision, config.training.compile) == (
            ("fp32", "off") if case.arithmetic == "truth" else ("bf16", "on")
        )
        if not case.is_reference:
            before = chosen[: chosen.index(case)]
            assert {c.arithmetic for c in before if c.is_reference and c.family == case.reference_family} == {
                *ARITHMETICS
            }


def test_every_axis_meets_two_devices() -> None:
    layouts = [parse_layout(text) for texts in LAYOUTS[2].values() for text in texts]
    for axis, least in dataclasses.asdict(Layout()).items():
        if axis != "acc":
            assert any(getattr(layout, axis) != least for layout in layouts), axis


def test_layouts_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--devices", "2", "--only", "tp=2:pp=2"]) == 2
    assert "layout tp=2:pp=2 needs 4 devices, and --devices is 2" in capsys.readouterr().err


def test_jobs_share_devices_and_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of one device share one, a job of two waits for both; one that hangs is ended."""
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, time\nprint('error: as asked')\ntime.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.setattr("train.layout_test.launch.MAIN", script)
    jobs = [
        Job(str(n), n, [seconds, status], tmp_path / f"{n}.txt")
        for n, seconds, status in ((1, "0", "3"), (2, "99", "0"))
    ]
    ended = list(run_all(jobs, devices=2, at_once=1, time_limit_s=15))
    assert [(job.name, job.status == 0) for job in ended] == [("1", False), ("2", False)]
    assert ended[0].last_words == "error: as asked" and len(ended[1].devices) == 2
    assert ended[1].seconds >= 15


def test_a_run_that_does_not_start_is_a_failure_with_its_words(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("something\nerror: the port is taken\nmore\n")
    case = Case("EReg", parse_layout("cp=2"), "trained")
    row = command.row(case, Job(case.name, 2, [], log, status=2), None, {})
    assert not row["passed"] and row["verdict"] == "FAILED error: the port is taken"
    assert "FAILED error: the port is taken" in command.table([row])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_layouts_on_cpus(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_COMPILE_THREADS", "1")
    sizes = ["model.num_layers=2", "model.hidden_size=64", "model.seq_length=32", "model.num_attention_heads=4"]
    batches = ["training.micro_batch_size=4", "training.global_batch_size=8"]
    arguments = ["--only", "cp=2,dp=2:zero=3", "--steps", "3", "--dataset", str(dataset), "--time-limit", "900"]
    file = tmp_path / "layouts.json"
    monkeypatch.setattr(sys, "argv", ["layout_test", *arguments])
    assert command.main([*arguments, "--work", str(tmp_path), "--json", str(file), *sizes, *batches]) == 0
    report = json.loads(file.read_text())
    assert [row["verdict"] for row in report["layouts"]] == ["ok", "ok"] and report["machine"]["torch"]
