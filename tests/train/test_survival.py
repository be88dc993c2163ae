"""Signals, kills, hangs and slow ranks."""

import contextlib
import faulthandler
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from parallel.local_ranks import start_ranks
from tests.train.faulty import killed_before_change, until, with_output_to_file, with_slow_rank, with_too_little_memory
from tests.train.runs import journal, rows, run_faulty, run_main, without_times
from train.config import Config
from train.loop.time_limits import TimeLimits
from train.run.journal import Journal

LONG = [
    "training.train_steps=100000",
    "training.evaluation_interval=0",
    "checkpoint.interval=20",
    "logging.interval=10",
]
STEADY = ["optimizer.schedule=wsd", "optimizer.decay_fraction=0", "optimizer.warmup_steps=1"]


def start(world_size: int, config: Path, folder: Path, *overrides: str) -> list[Any]:
    return start_ranks(
        with_output_to_file, world_size, str(folder), ["--config", str(config), *overrides], str(folder / "log")
    )


def wait(processes: list[Any], limit_s: float = 60.0) -> list[int]:
    for process in processes:
        process.join(limit_s)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def saved_steps(run: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [row["step"] for row in journal(run) if row["event"] == "saved"]
    return []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_saves_on_all_and_the_curve_goes_on(
    tiny_config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Evaluations, which may take long, are due at every step; the one at the last is made up for."""
    run, layout = tmp_path / "run", ["parallel.tensor_parallel_size=2", "training.evaluation_interval=1"]
    processes = start(2, tiny_config, tmp_path, *LONG, *STEADY, *layout)
    until(lambda: len(saved_steps(run)) > 0)
    os.kill(processes[1].pid, number)
    asked = time.monotonic()
    assert wait(processes) == [0, 0], (tmp_path / "log.0").read_text()
    assert time.monotonic() - asked < 60
    stopped = journal(run)[-1]
    assert stopped["event"] == "asked to stop" and saved_steps(run)[-1] == stopped["step"]
    assert max(row["step"] for row in rows(run) if "validation_loss" in row) == stopped["step"] - 1
    assert "stopped as asked at step" in (tmp_path / "log.0").read_text()

    end = f"training.train_steps={stopped['step'] + 5}"
    assert run_main(2, tiny_config, *LONG, *STEADY, *layout, end).statuses == [0, 0]
    assert run_main(2, tiny_config, *LONG, *STEADY, *layout, end, f"run_dir={tmp_path}/straight").statuses == [0, 0]
    assert without_times(run) == without_times(tmp_path / "straight")


def test_outside_a_section_nothing_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: calls.append("armed"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    limits = TimeLimits(Config(run_dir=str(tmp_path)), 0)
    with limits.section("step"):
        for _ in range(3):
            with limits.section("step"):
                pass
    assert calls == ["armed", "cancelled"]
    limits.close()


def test_a_line_of_the_journal_that_a_crash_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    Journal(tmp_path).write("started")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"time": "2026-01-31T12:00:0')
    Journal(tmp_path).write("resumed")
    assert [row["event"] for row in Journal(tmp_path).rows()] == ["started", "resumed"]


def test_a_second_signal_ends_at_once(tiny_config: Path, tmp_path: Path) -> None:
    slow = start_ranks(_with_slow_step, 1, str(tmp_path), ["--config", str(tiny_config), *LONG], str(tmp_path / "log"))
    until(lambda: (tmp_path / "in_step").exists())
    os.kill(slow[0].pid, signal.SIGTERM)
    time.sleep(0.3)
    assert slow[0].is_alive(), "the first one waits for the step to end"
    os.kill(slow[0].pid, signal.SIGTERM)
    assert wait(slow, 15) == [128 + signal.SIGTERM]
    assert "a second signal" in (tmp_path / "log.0").read_text()


def _with_slow_step(arguments: list[str], log: str) -> None:
    from parallel.sharding.stage import Stage

    body = Stage.body

    def slow(self: Any, *inputs: Any) -> Any:
        Path(log).with_name("in_step").touch()
        time.sleep(60)
        return body(self, *inputs)

    Stage.body = slow  # type: ignore[method-assign]
    with_output_to_file(arguments, log)


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_run_killed_while_it_validates_at_its_end_does_so_when_started_again(
    tiny_config: Path, tmp_path: Path, layout: str
) -> None:
    run, options = tmp_path / "run", [f"parallel.{layout}_parallel_size=2"]
    arguments = ["--config", str(tiny_config), *options]
    processes = start_ranks(_that_hangs_in_its_last_validation, 2, str(tmp_path), arguments, str(tmp_path / "log"))
    until(lambda: (tmp_path / "validates").exists())
    for process in processes:
        process.kill()
    wait(processes)
    again = run_main(2, tiny_config, *options)
    assert again.statuses == [0, 0] and "done: validation perplexity" in again.stdout
    assert run_main(2, tiny_config, *options, f"run_dir={tmp_path}/straight").statuses == [0, 0]
    assert without_times(run) == without_times(tmp_path / "straight")
    complete = run_main(2, tiny_config, *options)
    assert complete.statuses == [0, 0] and "is complete" in complete.stdout
    assert without_times(run) == without_times(tmp_path / "straight")


def _that_hangs_in_its_last_validation(arguments: list[str], log: str) -> None:
    from train.loop import trainer

    validate = trainer.validate

    def hanging(stage: Any, groups: Any, config: Any, step: int, limit_samples: int | None, evaluate: Any) -> Any:
        if limit_samples is None:
            Path(log).with_name("validates").touch()
            time.sleep(60)
        return validate(stage, groups, config, step, limit_samples, evaluate)

    trainer.validate = hanging
    with_output_to_file(arguments, log)


def test_kills_at_random_moments_leave_one_curve(tiny_config: Path, tmp_path: Path) -> None:
    kill_at_random(tiny_config, tmp_path, kills=3, steps=60)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_kills_at_random_moments_leave_one_curve(tiny_config: Path, tmp_path: Path) -> None:
    kill_at_random(tiny_config, tmp_path, kills=60, steps=3000)


def _has_saved_more(run: Path, before: int, process: Any) -> bool:
    return len(saved_steps(run)) > before + 1 or not process.is_alive()


def kill_at_random(config: Path, folder: Path, kills: int, steps: int) -> None:
    """kill -9 of either rank at any moment, most of them shortly after some step; then the run is let end."""
    run, options = folder / "run", ["parallel.tensor_parallel_size=2", f"training.train_steps={steps}"]
    options += ["training.evaluation_interval=50", "checkpoint.interval=3", "logging.interval=5"]
    moments = random.Random(os.environ.get("KILL_SEED", str(time.time_ns())))
    for number in range(kills):
        processes = start(2, config, folder, *options)
        before = len(saved_steps(run))
        if number % 5:
            until(partial(_has_saved_more, run, before, processes[0]), 120)
            time.sleep(moments.uniform(0, 0.5))
        else:
            time.sleep(moments.uniform(0, 3))
        victim = processes[moments.randrange(2)]
        victim.kill()
        statuses = wait(processes, 10)  # one that still waits for its start is killed then, as a launcher does
        assert set(statuses) <= {None, 0, 1, -signal.SIGKILL}, (statuses, (folder / "log.0").read_text())
    assert wait(start(2, config, folder, *options), 280) == [0, 0], (folder / "log.0").read_text()
    answer = run_main(2, config, *options, f"run_dir={folder}/straight")
    assert answer.statuses == [0, 0]
    assert without_times(run) == without_times(folder / "straight")
    assert not [row for row in journal(run) if row["event"] == "damaged checkpoint"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_any_change_on_disk_leaves_one_curve(tiny_config: Path, tmp_path: Path) -> None:
    """Every moment at which what a crash leaves behind can differ."""
    options = ["--config", str(tiny_config), "training.train_steps=9", "training.evaluation_interval=5"]
    options += ["checkpoint.interval=4", "checkpoint.keep=1", "checkpoint.keep_best=true", "logging.interval=3"]

    def run_killed_before(change: int, run: Path) -> int | None:
        arguments = [*options, f"run_dir={run}"]
        processes = start_ranks(killed_before_change, 1, str(tmp_path), arguments, str(tmp_path / "log"), change)
        return wait(processes)[0]

    straight = tmp_path / "straight"
    assert run_killed_before(0, straight) == 0
    changes = int((tmp_path / "changes").read_text())
    assert changes > 50
    for change in range(1, changes + 1):
        run = tmp_path / f"killed_{change}"
        assert run_killed_before(change, run) == -signal.SIGKILL
        assert run_killed_before(0, run) == 0, (change, (tmp_path / "log.0").read_text())
        assert without_times(run) == without_times(straight), change
        assert without_times(run, "entropy.jsonl") == without_times(straight, "entropy.jsonl"), change
        assert [row["step"] for row in rows(run, "ranks.jsonl")] == [
            row["step"] for row in rows(straight, "ranks.jsonl")
        ]
        assert not [row for row in journal(run) if row["event"] == "damaged checkpoint"], change


def test_a_rank_that_dies_ends_the_others_with_one_line(tiny_config: Path, tmp_path: Path) -> None:
    processes = start(2, tiny_config, tmp_path, *LONG, "parallel.tensor_parallel_size=2")
    until(lambda: len(saved_steps(tmp_path / "run")) > 0)
    processes[1].kill()
    assert wait(processes, 30)[0] == 1
    told = [line for line in (tmp_path / "log.0").read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "lost touch with another rank" in told[0]
    assert "Traceback" not in (tmp_path / "log.0").read_text()


def test_a_hang_ends_every_rank_with_its_stacks(tiny_config: Path, tmp_path: Path) -> None:
    options = [*LONG, "parallel.tensor_parallel_size=2", "health.step_limit_s=6"]
    processes = start_ranks(
        _with_hanging_rank, 2, str(tmp_path), ["--config", str(tiny_config), *options], str(tmp_path / "log")
    )
    assert wait(processes) == [4, 4], (tmp_path / "log.0").read_text()
    for rank in range(2):
        stacks = (tmp_path / f"run/stacks/rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}: the section 'step' has not ended within health.step_limit_s = 6 seconds" in stacks
        assert "train_step" in stacks
    assert journal(tmp_path / "run")[-1]["event"] == "time limit"
    assert "time.sleep" not in (tmp_path / "run/stacks/rank_00000.txt").read_text()
    assert "in hang" in (tmp_path / "run/stacks/rank_00001.txt").read_text(), "the one that hangs shows where"


def _with_hanging_rank(arguments: list[str], log: str) -> None:
    from parallel.sharding.stage import Stage

    body, calls = Stage.body, 0

    def hang(self: Any, *inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return body(self, *inputs)

    Stage.body = hang  # type: ignore[method-assign]
    with_output_to_file(arguments, log)


def test_the_slow_rank_is_named(tiny_config: Path, tmp_path: Path) -> None:
    options = ["training.micro_batch_size=2", "logging.interval=2"]
    answer = run_faulty(with_slow_rank, 2, tiny_config, options, 1, 0.1)
    assert answer.statuses == [0, 0], answer.stderr
    assert {row["slowest_rank"] for row in rows(tmp_path / "run", "ranks.jsonl")} == {1}
    assert all(len(row["forward_s"]) == 2 for row in rows(tmp_path / "run", "ranks.jsonl"))
    assert answer.stdout.count("rank 1 on ") == 1 and "is slow: forward 0." in answer.stdout


def test_too_little_memory_is_one_line_with_the_remedy_and_what_was_saved_stays(
    tiny_config: Path, tmp_path: Path
) -> None:
    answer = run_faulty(with_too_little_memory, 1, tiny_config, ["checkpoint.interval=2"], 6)
    assert answer.statuses == [1]
    assert answer.stderr.startswith("error: the device's memory does not hold training.micro_batch_size = 4 (CUDA out")
    assert "Tried to allocate 9.50 GiB" in answer.stderr and len(answer.stderr.splitlines()) == 1
    assert saved_steps(tmp_path / "run")[0] == 2, "complete before the next began"
    assert run_faulty(with_too_little_memory, 1, tiny_config, [], 1).statuses == [2], "it will never fit"
    assert run_main(1, tiny_config).statuses == [0]


def test_goodput_counts_every_restart(tiny_config: Path, tmp_path: Path) -> None:
    import json

    run = tmp_path / "run"
    often = [*LONG, "logging.interval=1", "checkpoint.interval=150"]
    processes = start(1, tiny_config, tmp_path, *often)
    until(lambda: len(saved_steps(run)) > 0 and 10 < rows(run)[-1]["step"] % 150 < 100)
    processes[0].kill()
    wait(processes)
    started = time.time()
    time.sleep(3)
    last = saved_steps(run)[-1] + 5
    assert run_main(1, tiny_config, *often, f"training.train_steps={last}").statuses == [0]
    kept = json.loads((run / "goodput.json").read_text())
    assert kept["seconds"]["lost"] > 0, "steps after the checkpoint were done twice"
    assert kept["seconds"]["down"] > 1.5 and kept["seconds"]["save"] > 0 and kept["seconds"]["start_up"] > 0
    assert kept["goodput"] == pytest.approx(kept["seconds"]["steps"] / sum(kept["seconds"].values()))
    assert kept["updated"] > started
    assert all("goodput" in row for row in rows(run) if "loss" in row)
