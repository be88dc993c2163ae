"""Numbers that go wrong: what is skipped, when a run goes back, when it stops, and what it says."""

import json
import math
import random
from pathlib import Path

import pytest

from parallel.engine.telemetry import FINITE, StepReport
from tests.train.faulty import with_bad_samples, with_too_little_memory
from tests.train.runs import journal, rows, run_faulty, run_main, without_times
from train.config.sections import HealthConfig
from train.loop.health import RECENT_STEPS, Health
from train.run.entropy_words import ceiling_nats, describe, first_fall


def judge(health: Health, step: int, loss: float, norm: float = 1.0) -> bool:
    """Whether a step that measured this is accepted, by what the device does with the limits."""
    limits = health.limits(step)
    accepted = math.isfinite(loss) and math.isfinite(norm) and loss <= limits.loss and norm <= limits.gradient_norm
    health.remember(
        step, StepReport({"ce_loss": loss, "entropy_loss": 0.0}, norm, stop_requested=False, accepted=accepted), limits
    )
    return accepted


def test_what_is_not_finite_is_always_refused() -> None:
    health = Health(HealthConfig(spike_factor=0))
    assert not judge(health, 1, math.nan) and "loss is nan" in str(health.reason)
    assert not judge(health, 2, math.inf)
    assert not judge(health, 3, 3.0, math.inf) and health.reason == "the gradients are not finite"
    assert judge(health, 4, 1e9, 1e9) and health.reason is None


def test_spikes_are_told_from_an_ordinary_curve() -> None:
    """A noisy falling loss and a norm of heavy tails give no alarm; a nat above does, and is not remembered."""
    noise = random.Random(1)
    health = Health(HealthConfig())
    for step in range(2000):
        loss = 3 + 7 * math.exp(-step / 100) + noise.gauss(0, 0.05)
        norm = math.exp(noise.gauss(0, 0.3)) * (3 if noise.random() < 0.01 else 1)
        assert judge(health, step, loss, norm), f"step {step}: {health.reason}"
    for step in range(2000, 2006, 2):
        assert not judge(health, step, 4.0) and "far above recent steps" in str(health.reason)
        assert not judge(health, step + 1, 3.0, 60.0) and "gradient norm" in str(health.reason)
    assert judge(health, 2006, 3.05)


def test_limits_are_those_of_an_uninterrupted_run() -> None:
    """Whether the step before has been read already, and whether the history was saved since, makes no difference."""
    noise = random.Random(2)
    reports = [
        StepReport({"ce_loss": noise.gauss(3, 0.1), "entropy_loss": 0.0}, math.exp(noise.gauss(0, 0.3)), False, True)
        for _ in range(300)
    ]
    late, limited = Health(HealthConfig(window=40)), 0
    for step in range(1, 301):
        prompt = Health(HealthConfig(window=40))
        prompt.load_state_dict(json.loads(json.dumps(late.state_dict())))
        if step > 1:
            prompt.remember(step - 1, reports[step - 2], FINITE)
        assert late.limits(step) == prompt.limits(step)
        limited += late.limits(step) != FINITE
        if step > 1:
            late.remember(step - 1, reports[step - 2], FINITE)
    assert limited == 300 - 11  # a quarter of the window, and the step that is not seen


def test_a_resumed_run_skips_what_an_uninterrupted_one_does(tiny_config: Path, tmp_path: Path) -> None:
    """Step 17 comes soon after the resume at step 16, or 12 where that was not written in time: too soon to judge it by
    steps since then alone.
    """
    options = ["training.train_steps=20", "health.window=40", "checkpoint.interval=4", "training.evaluation_interval=0"]
    spike = 128, 136, 9.0, 0
    straight = run_faulty(with_bad_samples, 1, tiny_config, [*options, f"run_dir={tmp_path}/straight"], *spike)
    assert straight.statuses == [0], straight.stderr
    assert [row["step"] for row in journal(tmp_path / "straight") if row["event"] == "skipped step"] == [17]
    assert run_faulty(with_too_little_memory, 1, tiny_config, options, 17).statuses == [1]
    assert run_faulty(with_bad_samples, 1, tiny_config, options, *spike).statuses == [0]
    assert next(row for row in journal(tmp_path / "run") if row["event"] == "resumed")["step"] in (12, 16)
    assert without_times(tmp_path / "run") == without_times(tmp_path / "straight")


def test_skipping_escalates_to_going_back_and_to_stopping() -> None:
    health = Health(HealthConfig(skip_limit=3, rollback_limit=2))
    for step in range(1, 11):
        judge(health, step, 3.0)
    for step in range(11, 14):
        assert not health.must_go_back
        judge(health, step, math.nan)
    assert health.must_go_back and health.first_refused(13) == 11
    assert health.may_go_back(13)
    health.forget()
    assert not health.must_go_back
    assert health.may_go_back(14) and not health.may_go_back(14)
    assert health.may_go_back(14 + RECENT_STEPS + 1), "another trouble is counted anew"


def test_collapse_and_overload_have_names() -> None:
    ceiling = ceiling_nats(128)
    assert ceiling == pytest.approx(3.878, abs=1e-3)
    healthy, high, low, lost = [2.0, 2.2], [ceiling * 0.99] * 2, [0.01, 0.05], [math.nan] * 2
    assert "no layer collapsed, no head overloaded" in describe([healthy, healthy], 128)
    words = describe([healthy, high, low, lost], 128)
    assert "entropy collapse in layers 2 (0.03)" in words and "not finite in layers 3" in words
    assert "entropic overload in 2 of 8 heads" in words and "ceiling ln(T!)/T = 3.88 nats" in words
    fall = first_fall([(7, [healthy, healthy]), (8, [healthy, low]), (9, [lost, lost])], 128)
    assert fall is not None and (fall.layer, fall.step) == (1, 8)
    assert str(fall) == "layer 1 fell first: at step 8 its mean entropy is 0.030 nats"


def test_one_bad_step_is_skipped_by_all_ranks_and_journalled(tiny_config: Path, tmp_path: Path) -> None:
    """Samples 24 to 31 are step 4; only rank 1 of two sees anything wrong with them."""
    options = ["training.micro_batch_size=2", "checkpoint.interval=4"]
    answer = run_faulty(with_bad_samples, 2, tiny_config, options, 24, 32, math.nan, 1)
    assert answer.statuses == [0, 0], answer.stderr
    steps = [row for row in rows(tmp_path / "run") if "learning_rate" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in steps if "skipped" in row] == [4]
    (event,) = (row for row in journal(tmp_path / "run") if row["event"] == "skipped step")
    assert event["step"] == 4 and event["reason"] == "the loss is nan" and event["samples"] == [24, 31]
    assert event["shards"] and all(name.endswith(".tar") for name in event["shards"])
    assert len(event["entropy_nats"]) == 2 and len(event["temperature"]) == 2
    saved = [row["step"] for row in journal(tmp_path / "run") if row["event"] == "saved"]
    assert saved == [5, 8, 12], "what falls on a refused step is saved at the next good one"
    assert "step 4 skipped: the loss is nan" in answer.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing(tiny_config: Path, tmp_path: Path, precision: str) -> None:
    """Refused by DeepSpeed for its gradients or by us for its loss, step 4 leaves the same weights to step 5."""
    fifth = []
    for name, factor in (("nan", math.nan), ("spike", 1e4)):
        options = [f"run_dir={tmp_path}/{name}", f"training.precision={precision}", "training.train_steps=5"]
        options.append("health.window=4")
        assert run_faulty(with_bad_samples, 1, tiny_config, options, 24, 32, factor, 0).statuses == [0]
        steps = [row for row in without_times(tmp_path / name) if "learning_rate" in row]
        assert [row["step"] for row in steps if "skipped" in row] == [4]
        fifth.append(steps[-1])
    assert "far above recent steps" in rows(tmp_path / "spike")[3]["skipped"]
    assert fifth[0] == fifth[1]


def test_the_run_goes_back_past_the_samples_that_hurt_it(tiny_config: Path, tmp_path: Path) -> None:
    """Steps 6 to 10 read bad samples: after the limit of three the run is back at step 4, reading on after step 8."""
    options = ["checkpoint.interval=2", "health.skip_limit=3", "logging.interval=2"]
    answer = run_faulty(with_bad_samples, 1, tiny_config, options, 40, 64, math.nan, 0)
    assert answer.statuses == [0], answer.stderr
    run = tmp_path / "run"
    events = journal(run)
    assert [row["step"] for row in events if row["event"] == "skipped step"] == [6, 7, 8]
    (back,) = (row for row in events if row["event"] == "rolled back")
    assert (back["from_step"], back["step"], back["next_sample"]) == (8, 4, 64)
    steps = [row for row in rows(run) if "learning_rate" in row]
    assert [row["step"] for row in steps] == list(range(1, 13)), "one curve, no step twice"
    assert not any("skipped" in row for row in steps)
    assert [row["first_sample"] // 8 for row in steps] == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert "went back from step 8 to the checkpoint of step 4" in answer.stderr
    assert rows(run, "entropy.jsonl")[-1]["step"] == 12
    from train.checkpoint.folder import Folder, read_marker

    marker = read_marker(Folder(str(run / "checkpoints/step_00000012")))
    assert marker["data_state"]["samples_consumed"] == 64 + 8 * 8


def test_trouble_between_logging_steps_is_answered_one_step_late(tiny_config: Path, tmp_path: Path) -> None:
    """Steps 6 to 8 are refused when they run, and the run goes back when step 9, already under way, is done."""
    options = ["checkpoint.interval=5", "health.skip_limit=3", "logging.interval=50", "training.evaluation_interval=0"]
    answer = run_faulty(with_bad_samples, 1, tiny_config, options, 40, 64, math.nan, 0)
    assert answer.statuses == [0], answer.stderr
    events = journal(tmp_path / "run")
    assert [row["step"] for row in events if row["event"] == "skipped step"] == [6, 7, 8]
    (back,) = (row for row in events if row["event"] == "rolled back")
    assert (back["from_step"], back["step"], back["first_refused"], back["next_sample"]) == (9, 5, 6, 72)
    steps = [row for row in rows(tmp_path / "run") if "learning_rate" in row]
    assert [row["step"] for row in steps] == list(range(1, 13)) and not any("skipped" in row for row in steps)
    assert [row["first_sample"] // 8 for row in steps] == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]


def test_trouble_that_stays_ends_the_run_with_what_was_saved(tiny_config: Path, tmp_path: Path) -> None:
    options = ["checkpoint.interval=2", "health.skip_limit=2", "health.rollback_limit=1"]
    answer = run_faulty(
        with_bad_samples, 2, tiny_config, [*options, "parallel.tensor_parallel_size=2"], 40, 4000, 1e999, 0
    )
    assert answer.statuses == [3, 3] and answer.stderr.count("error:") == 1, answer.stderr
    assert "going back to a checkpoint has not helped" in answer.stderr and "journal.jsonl" in answer.stderr
    assert journal(tmp_path / "run")[-1]["event"] == "stopped"
    assert run_main(1, tiny_config).statuses == [0], "the checkpoint before the trouble is good"


def test_without_an_older_checkpoint_the_run_stops(tiny_config: Path) -> None:
    answer = run_faulty(with_bad_samples, 1, tiny_config, ["health.skip_limit=2"], 8, 4000, math.nan, 0)
    assert answer.statuses == [3] and "no checkpoint is older" in answer.stderr


def test_a_network_of_softmax_alone_reaches_nan_and_the_report_says_which_layer_fell_first(
    tiny_config: Path, tmp_path: Path
) -> None:
    """SM has no norm, no activation, no scaling and no regularizer: a high rate sends it where the paper's went."""
    options = [
        "model.architecture=SM",
        "model.num_layers=6",
        "optimizer.learning_rate=0.3",
        "optimizer.warmup_steps=1",
        "optimizer.gradient_clipping=0",
        "training.train_steps=60",
        "training.evaluation_interval=0",
        "health.spike_factor=0",
        "logging.interval=1",
    ]
    answer = run_main(1, tiny_config, *options)
    assert answer.statuses == [3], answer.stderr
    assert "fell first: at step" in answer.stderr
    skipped = [row for row in journal(tmp_path / "run") if row["event"] == "skipped step"]
    assert skipped and skipped[-1]["first_fall"].startswith("layer ")
    collapses = [row for row in journal(tmp_path / "run") if row["event"] == "collapse"]
    assert collapses and "entropy collapse in layers" in collapses[0]["words"], "named before the end"
