"""Whole runs through train.main: resuming, other layouts, evaluation, and what bad input is answered with."""

import json
import shutil
from pathlib import Path

import pytest

from parallel.local_ranks import run_ranks
from tests.train.runs import assert_close, journal, main_output, rows, run_main, without_times


def interrupted_copy(run: Path, step: int) -> Path:
    """A run as a crash some steps after the checkpoint of `step` leaves it: later rows, the last of them cut off."""
    copy = run.with_name("interrupted")
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text[: len(text) - 25])
    return copy


def test_a_run_leaves_every_step_and_resumes_bit_for_bit(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_main(1, tiny_config)
    assert answer.statuses == [0], answer.stderr
    run = tmp_path / "run"
    steps = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(row["loss"] == pytest.approx(row["ce_loss"] + row["entropy_loss"]) for row in steps)
    assert all(row["entropy_loss"] > 0 for row in steps)
    assert [row["step"] for row in rows(run) if "validation_loss" in row] == [6, 12]
    assert [row["step"] for row in rows(run, "entropy.jsonl")] == [4, 8, 12]

    copy = interrupted_copy(run, 6)
    assert run_main(1, tiny_config, f"run_dir={copy}").statuses == [0]
    assert without_times(copy) == without_times(run)

    complete = run_main(1, tiny_config)
    assert complete.statuses == [0] and "is complete" in complete.stdout


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ["parallel.tensor_parallel_size=2"]),
        (2, ["parallel.pipeline_parallel_size=2"]),
        (2, ["training.micro_batch_size=2", "parallel.zero_stage=3"]),
    ],
)
def test_another_layout_goes_on_where_one_process_stopped(
    tiny_config: Path, tmp_path: Path, world_size: int, layout: list[str]
) -> None:
    assert run_main(1, tiny_config).statuses == [0]
    copy = interrupted_copy(tmp_path / "run", 6)
    answer = run_main(world_size, tiny_config, f"run_dir={copy}", *layout)
    assert answer.statuses == [0] * world_size, answer.stderr
    assert_close(without_times(copy), without_times(tmp_path / "run"), 1e-5)


@pytest.mark.parametrize(("world_size", "layout"), [(1, []), (2, ["parallel.tensor_parallel_size=2"])])
def test_norms_taper_on_after_an_interruption(
    tiny_config: Path, tmp_path: Path, world_size: int, layout: list[str]
) -> None:
    """The gate is 1 up to step 2 and 0 from step 9 on; the scales of step 3 come from the checkpoint of step 6."""
    taper = ["model.architecture=SM+TN", "optimizer.taper_start=0.2", "optimizer.taper_end=0.75"]
    assert run_main(1, tiny_config, *taper).statuses == [0]
    run = tmp_path / "run"
    copy = interrupted_copy(run, 6)
    answer = run_main(world_size, tiny_config, f"run_dir={copy}", *taper, *layout)
    assert answer.statuses == [0] * world_size, answer.stderr
    assert_close(without_times(copy), without_times(run), 0 if world_size == 1 else 1e-5)
    assert run_ranks(_evaluate, 1, str(copy)) == [0]
    evaluation = json.loads((copy / "evaluation.json").read_text())
    assert evaluation["validation_loss"] == pytest.approx(rows(run)[-1]["validation_loss"], rel=1e-6)


def test_one_process_evaluates_what_four_trained(tiny_config: Path, tmp_path: Path) -> None:
    layout = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]
    assert run_main(4, tiny_config, *layout).statuses == [0] * 4
    run = tmp_path / "run"
    run = run.rename(tmp_path / "moved")
    assert run_ranks(_evaluate, 1, str(run)) == [0]
    evaluation = json.loads((run / "evaluation.json").read_text())
    last = next(row for row in reversed(rows(run)) if "validation_loss" in row)
    assert evaluation["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert evaluation["entropy_nats"][1][3] > 0
    assert evaluation["validation_loss_halves"] == pytest.approx(last["validation_loss_halves"], rel=1e-6)

    batch, length = (json.loads((run / "config.json").read_text())["config"][section][key] for section, key in
                     (("training", "micro_batch_size"), ("model", "seq_length")))  # fmt: skip
    samples = last["validation_tokens"] // length
    first = -(-samples // batch) // 2 * batch
    assert run_ranks(_evaluate, 1, str(run), "--samples", str(first)) == [0]
    half = json.loads((run / "evaluation.json").read_text())["validation_loss"]
    second = (samples * last["validation_loss"] - first * half) / (samples - first)
    assert last["validation_loss_halves"] == pytest.approx([half, second], rel=1e-5)


def _evaluate(run: str, *more: str) -> int:
    from train.evaluate import main

    return main(["--run", run, *more])


def test_a_result_that_could_not_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.evaluate import main

    (tmp_path / "config.json").write_text(json.dumps({"config": {"training": {"train_steps": 1}}}))
    (tmp_path / "evaluation.json").mkdir()
    assert main(["--run", str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'evaluation.json'}: cannot be written; remove" in capsys.readouterr().err


def test_world_size_and_batch_must_fit(tiny_config: Path) -> None:
    answer = run_main(2, tiny_config, "parallel.tensor_parallel_size=4")
    assert answer.statuses == [2, 2]
    assert answer.stderr.count("error:") == 1 and "world size 2 is not a multiple" in answer.stderr
    answer = run_main(1, tiny_config, "training.global_batch_size=6")
    assert answer.statuses == [2] and "not a multiple of micro_batch_size(4)" in answer.stderr


def test_a_run_of_another_model_or_seed_is_not_touched(tiny_config: Path, tmp_path: Path) -> None:
    assert run_main(1, tiny_config).statuses == [0]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    answer = run_main(1, tiny_config, "model.num_layers=3")
    assert answer.statuses == [2]
    assert "holds a run of another model (model.num_layers is 2 there and 3 here)" in answer.stderr
    answer = run_main(1, tiny_config, "training.seed=77")
    assert answer.statuses == [2] and "holds a run of another seed (training.seed is" in answer.stderr
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    del before[tmp_path / "run" / "run.lock"], after[tmp_path / "run" / "run.lock"]
    assert after == before


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("data.shuffle_window_shards=4", "the saved position in the data has window_shards"),
        ("training.global_batch_size=16", "trained with training.global_batch_size = 8, but the configuration has 16"),
        ("checkpoint.path=elsewhere", "elsewhere: holds no checkpoint, but the run in"),
    ],
)
def test_a_resumption_that_cannot_be_leaves_the_run_as_it_is(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(1, tiny_config).statuses == [0]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    change = change.replace("elsewhere", f"{tmp_path}/elsewhere")
    answer = run_main(2, tiny_config, change, "parallel.tensor_parallel_size=2")
    assert answer.statuses == [2, 2] and answer.stderr.count("\n") == 1 and wanted in answer.stderr
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    del before[tmp_path / "run" / "run.lock"], after[tmp_path / "run" / "run.lock"]
    assert after == before


def test_settings_changed_at_a_resumption_are_told_and_noted(tiny_config: Path, tmp_path: Path) -> None:
    assert run_main(1, tiny_config, "training.train_steps=6").statuses == [0]
    answer = run_main(1, tiny_config, "training.train_steps=7", "regularizer.coefficient=3.0")
    assert "at step 6, regularizer.coefficient = 3.0 (was " in answer.stdout
    (resumed,) = (row for row in journal(tmp_path / "run") if row["event"] == "resumed")
    assert resumed["changed"].keys() == {"training.train_steps", "regularizer.coefficient"}
    assert resumed["changed"]["training.train_steps"] == [6, 7]


def test_a_run_directory_in_use_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as lock:
        lock.write("process 7 on node3")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = run_main(1, tiny_config)
    assert answer.statuses == [2] and "process 7 on node3 is training there" in answer.stderr


def test_a_missing_dataset_is_named(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_main(1, tiny_config, f"data.path={tmp_path}/nowhere")
    assert answer.statuses == [2] and "nowhere" in answer.stderr and answer.stderr.count("\n") == 1


def test_a_dataset_that_one_node_does_not_see_is_named_there(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "9", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.start.same_start.REFUSAL_LIMIT_S", 0.5)
    status, _, err = main_output(["--config", str(tiny_config), f"data.path={tmp_path}/nowhere"])
    assert status == 2 and err.startswith("error: rank 9: ") and "nowhere" in err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main_output(["--config", str(tiny_config), f"data.path={tmp_path}/nowhere"]) == (2, "", "")


def test_an_unknown_kind_of_checkpoint_store_is_named(tiny_config: Path) -> None:
    answer = run_main(2, tiny_config, "checkpoint.path=s4://bucket/run", "training.micro_batch_size=1")
    assert answer.statuses == [2, 2] and answer.stderr.count("\n") == 1
    assert "checkpoint.path = 's4://bucket/run' cannot be used (Protocol not known: s4)" in answer.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tiny_config: Path, tmp_path: Path) -> None:
    answer = run_main(
        1, tiny_config, "optimizer.learning_rate=1e30", "optimizer.gradient_clipping=0", "checkpoint.interval=1"
    )
    assert answer.statuses == [3] and "the loss is nan" in answer.stderr.lower()


def test_tensorboard_shows_one_curve_after_an_interruption(tiny_config: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_main(1, tiny_config, "logging.tensorboard=true", "training.train_steps=8").statuses == [0]
    copy = interrupted_copy(tmp_path / "run", 6)
    assert run_main(1, tiny_config, "logging.tensorboard=true", f"run_dir={copy}").statuses == [0]
    curves = EventAccumulator(str(copy / "tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("loss/loss")] == list(range(1, 13))
    rates = [event.value for event in curves.Scalars("optimizer/learning_rate")]
    assert rates == pytest.approx([row["learning_rate"] for row in rows(copy) if "learning_rate" in row])
