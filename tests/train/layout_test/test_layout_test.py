"""The program behind make test-gpu: what it runs, its verdict on runs of known content, and one pass over processes."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from parallel.layout import Layout
from train.config import load_config
from train.layout_test import launch
from train.layout_test.__main__ import main, parse
from train.layout_test.cases import ARITHMETICS, FAMILIES, cases
from train.layout_test.jobs import choose, job
from train.layout_test.launch import Job, run_all
from train.layout_test.report import row, table
from train.layout_test.results import Trained, Verdict, judge

GRADIENTS = {"layers.0.w": torch.ones(4), "layers.1.w": torch.ones(4), "head.weight": torch.full((2, 2), 2.0)}
LOSSES = [8.0, 7.5, 7.0]
TRUTH = Trained(GRADIENTS, LOSSES, gradient_norm=1.0)
BASELINE = Trained({name: 1.01 * values for name, values in GRADIENTS.items()}, [8.0, 7.51, 7.01], gradient_norm=1.0)


def judged(name: str = "", values: torch.Tensor | None = None, losses: list[float] = BASELINE.losses) -> Verdict:
    """The verdict on the baseline itself, with one gradient or its losses replaced; None for a missing gradient."""
    moments = {each: held for each, held in BASELINE.moments.items() if each != name}
    if values is not None:
        moments[name] = values
    return judge(Trained(moments, losses, 1.0), TRUTH, BASELINE)


def test_a_layout_as_far_off_as_one_process_passes() -> None:
    verdict = judged()
    assert verdict.passed and verdict.words == "ok" and verdict.loss_error_nats == 0
    assert verdict.gradient_error == pytest.approx(0.01, rel=1e-4)
    assert verdict.gradient_limit == pytest.approx(1.5 * 0.01 + 2**-8, rel=1e-4)


@pytest.mark.parametrize("values", [None, torch.zeros(4), torch.full((4,), torch.nan), torch.ones(2)])
def test_a_gradient_that_is_gone_is_named(values: torch.Tensor | None) -> None:
    verdict = judged("layers.1.w", values)
    assert not verdict.passed and verdict.words == "LOST layers.1.w"


def test_a_single_number_that_cancels_in_one_layer_is_not_lost() -> None:
    """As in a run's first step: in bf16 its few terms may cancel, but hardly in every layer at once."""
    alphas = [f"layers.{layer}.ffn.alpha" for layer in range(3)]
    truth = dataclasses.replace(TRUTH, moments={**GRADIENTS, **dict.fromkeys(alphas, torch.tensor(1e-6))})

    def verdict(*values: float) -> Verdict:
        found = {**BASELINE.moments, **dict(zip(alphas, map(torch.tensor, values), strict=True))}
        return judge(dataclasses.replace(BASELINE, moments=found), truth, dataclasses.replace(truth, losses=LOSSES))

    assert verdict(1e-6, 0.0, 1e-6).lost == [] and verdict(1e-6, 0.0, 0.0).lost == []
    assert verdict(0.0, 0.0, 0.0).lost == alphas
    assert verdict(1e-6, math.nan, 1e-6).lost == [alphas[1]]


def test_a_gradient_beyond_its_limit() -> None:
    assert judged("layers.1.w", torch.full((4,), 1.018)).passed
    verdict = judged("layers.1.w", torch.full((4,), 1.02))
    assert verdict.words == "BEYOND" and verdict.worst_parameter == "layers.1.w"


@pytest.mark.parametrize(
    ("losses", "passed"),
    [
        ([8.0, 7.519, 7.01], True),
        ([8.0, 7.53, 7.01], False),
        ([8.0, math.nan, 7.01], False),  # after a step that is right
        ([8.0, 7.51], False),
        ([8.0, 7.51, 7.01, 6.9], False),
    ],
)
def test_curves(losses: list[float], passed: bool) -> None:
    assert judged(losses=losses).passed is passed


def test_no_layout_passes_where_one_process_loses_a_gradient() -> None:
    zero = {**BASELINE.moments, "layers.1.w": torch.zeros(4)}
    found = dataclasses.replace(BASELINE, moments={**BASELINE.moments, "layers.1.w": torch.full((4,), 2.0)})
    verdict = judge(found, TRUTH, dataclasses.replace(BASELINE, moments=zero))
    assert not verdict.passed and verdict.words == "one process LOST layers.1.w"


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_layout_fits_and_has_both_references_before_it(devices: int) -> None:
    chosen = cases(devices)
    assert max(case.layout.world_size for case in chosen) == devices and len(set(chosen)) == len(chosen)
    seen: set[tuple[str, str]] = set()
    for case in chosen:
        if case.is_reference:
            seen.add((case.family, case.arithmetic))
        else:
            assert {(case.reference_family, each) for each in ARITHMETICS} <= seen


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_run_is_one_that_can_be_trained(devices: int, tmp_path: Path) -> None:
    options = parse(["--devices", str(devices)])
    for case in cases(devices):
        made = job(case, options, tmp_path)  # refuses what does not fit
        config = load_config(made.arguments[1], made.arguments[2:])
        assert config.num_micro_batches(made.processes) == 2, "per_head depends on their size"
        exact = case.arithmetic == "truth"
        assert (config.training.precision, config.training.compile) == (("fp32", "off") if exact else ("bf16", "on"))


def test_two_devices_hold_every_axis_stage_and_family() -> None:
    layouts = [(case.family, case.layout) for case in cases(2)]
    assert {family for family, _ in layouts} == set(FAMILIES)
    for axis in (Layout(tp=2), Layout(tp=2, sp=1), Layout(pp=2), Layout(cp=2), Layout(dp=2, zero=2), Layout(dp=2)):
        assert ("EReg", axis) in layouts
    assert {"selective", "full"} <= {layout.recompute for _, layout in layouts}


@pytest.mark.parametrize("text", ["tp=4", "cp=2,dp=2:tp=2"])
def test_a_layout_larger_than_the_machine_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"needs 4 devices, and --devices is 2"):
        choose(parse(["--devices", "2", "--only", text]))


def test_a_layout_that_does_not_start_is_a_row_with_its_last_error(tmp_path: Path) -> None:
    (log := tmp_path / "log.txt").write_text("starting\nerror: no room\nTraceback, of the launcher\n")
    case = next(case for case in cases(2) if not case.is_reference)
    failed = row(case, Job(case.name, 1, [], log), None, {})
    assert not failed["passed"] and failed["verdict"] == "FAILED error: no room"
    assert "FAILED error: no room" in table([failed])


def a_program_that_never_ends(folder: Path) -> Path:
    """Each process of it leaves its number in the folder that is its argument."""
    (program := folder / "sleep.py").write_text(
        "import os, sys, time\n"
        "name = os.path.join(sys.argv[1], os.environ['RANK'])\n"
        "open(name + '.part', 'w').write(str(os.getpid()))\n"
        "os.rename(name + '.part', name + '.pid')\n"
        "time.sleep(600)\n"
    )
    return program


def still_runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_a_run_that_is_ended_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would hold its devices while the layouts after it train."""
    monkeypatch.setattr(launch, "MAIN", a_program_that_never_ends(tmp_path))
    launcher = launch._start(Job("hung", 2, [str(tmp_path)], tmp_path / "log.txt"))
    while len(files := list(tmp_path.glob("*.pid"))) < 2:
        assert launcher.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    launch._end(launcher)
    assert not [pid for pid in (int(file.read_text()) for file in files) if still_runs(pid)]


def test_a_run_beyond_the_time_limit_failed_whatever_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAIN", a_program_that_never_ends(tmp_path))
    (job,) = run_all([Job("late", 1, [str(tmp_path)], tmp_path / "log.txt")], 1, 1, time_limit_s=0.0)
    assert job.is_late and job.status != 0 and job.last_words.startswith("still running after")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_layouts_over_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program itself, in bf16 and compiled, as `make test-gpu` runs it."""
    options = ["--devices", "2", "--at-once", "1", "--steps", "2", "--time-limit", "1500"]
    tiny = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4"]
    batch = ["training.micro_batch_size=4", "training.global_batch_size=8"]
    file = tmp_path / "table.json"
    assert main([*options, "--only", "cp=2,dp=2:zero=3", "--json", str(file), *tiny, *batch]) == 0
    assert "2 of 2 layouts train as one process does" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert [(line["passed"], line["steps"]) for line in report["layouts"]] == [(True, 2)] * 2
    assert all(1e-4 < line["gradient_error"] <= line["gradient_limit"] for line in report["layouts"])  # bf16 rounds
