"""Harm done while the run goes on: files deleted, replaced or locked away, and two runs in one place."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from tests.torture.attack import FAST_END_S, Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, errors, judged, survived
from tests.torture.processes import Ended, Ranks, Tamper
from tests.torture.stand import HANG_LIMIT_S, ONE, STEPS, in_step

FILES = ("metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "journal.jsonl", "run.lock", "config.json", "goodput.json")


def paused_in_step(number: int, flag: Path) -> Tamper:
    """Wait at the start of step `number` until a file is gone."""

    def pause() -> None:
        flag.touch()
        while flag.exists():
            time.sleep(0.01)

    return in_step(number, pause)


def started_until(trial: Trial, run: Path, number: int, *overrides: str) -> tuple[Ranks, Path]:
    """Start a run and return once it pauses in a step; it goes on when the returned file is deleted."""
    flag = trial.folder / f"paused-{time.monotonic_ns()}"
    ranks = trial.start(run, ONE, *overrides, tamper=paused_in_step(number, flag))
    ranks.until(flag.exists, HANG_LIMIT_S)
    return ranks, flag


@attack("running")
def delete_while_running(trial: Trial) -> Outcome:
    """A file of a run is deleted, renamed or replaced while it trains: the run has to notice, or need nothing of it."""
    run, number = trial.folder / "run", trial.random.randint(2, STEPS)
    name = trial.random.choice(FILES)
    how = trial.random.choice(["deleted", "renamed", "replaced", "emptied", "folder renamed"])
    trial.did(f"{name} {how} in step {number}")
    ranks, flag = started_until(trial, run, number)
    file, aside = run / name, trial.folder / "aside"
    sound = file.read_bytes() if file.exists() else b""
    if how == "deleted":
        file.unlink(missing_ok=True)
    elif how == "folder renamed":
        run.rename(aside)
    elif how == "emptied":
        if file.exists():
            os.truncate(file, 0)
    elif file.exists():
        file.rename(aside)
        if how == "replaced":
            file.write_text("someone else's\n")
    flag.unlink()
    ended = ranks.wait(HANG_LIMIT_S)
    check_ending(ended)
    if how == "folder renamed":
        return _folder_renamed(trial, ended, run, aside)
    if set(ended.statuses) == {0}:
        if name in ("goodput.json", "config.json", "run.lock"):  # written anew or guarded: curves and weights count
            survived_except_goodput(run, trial)
            return Outcome.SURVIVED
        try:
            survived(run, trial)
        except Lost:
            if any(line.startswith("warning:") and name in line for line in ended.text.splitlines()):
                return Outcome.NAMED
            raise
        return Outcome.SURVIVED
    if not any(name in line for line in errors(ended)):
        raise Lost(f"the message does not name {name}: {ended.text[-300:]}")
    if file.is_dir() or how == "replaced":
        file.unlink(missing_ok=True)
    file.write_bytes(sound)
    if judged(run, trial, trial.train(run)) is not Outcome.SURVIVED:
        raise Lost("refused even with the sound file")
    return Outcome.NAMED


def survived_except_goodput(run: Path, trial: Trial) -> None:
    goodput = run / "goodput.json"
    if not goodput.exists():
        shutil.copy(trial.stand.straight() / goodput.name, goodput)
    survived(run, trial)


def _folder_renamed(trial: Trial, ended: Ended, run: Path, aside: Path) -> Outcome:
    """The folder has another name: the run may go on there or end with a message, but loses nothing."""
    if set(ended.statuses) == {0}:
        try:
            survived(aside, trial)
        except Lost:
            survived(run, trial)
        return Outcome.SURVIVED
    if run.exists():
        shutil.rmtree(run)
    aside.rename(run)
    if judged(run, trial, trial.train(run)) is not Outcome.SURVIVED:
        raise Lost("refused even under its old name")
    return Outcome.NAMED


@attack("running")
def two_trainers_in_one_folder(trial: Trial) -> Outcome:
    """A second trainer starts in a folder where one trains, its lock deleted or replaced: it is refused."""
    run, number = trial.folder / "run", trial.random.randint(2, STEPS - 1)
    how = trial.random.choice(["kept", "deleted", "replaced"])
    trial.did(f"second start in step {number}, run.lock {how}")
    ranks, flag = started_until(trial, run, number)
    lock = run / "run.lock"
    if how != "kept":
        lock.unlink()
    if how == "replaced":
        lock.write_text("")
    second = trial.start(run)
    if how == "kept":
        told = second.wait(HANG_LIMIT_S)
        check_ending(told)
        flag.unlink()
        if told.statuses != [2]:
            raise Lost(f"the second trainer ended with {told.statuses}")
    else:
        time.sleep(0.5)
        flag.unlink()
    ended = ranks.wait(HANG_LIMIT_S)
    check_ending(ended)
    if how != "kept":
        told = second.wait(HANG_LIMIT_S)
        check_ending(told)
        if ended.statuses == [0] and told.statuses == [0] and "is complete" not in told.text:
            raise Lost("two trainers ran in one folder")
    if judged(run, trial, trial.train(run)) is not Outcome.SURVIVED:
        raise Lost("the run is refused afterwards")
    return Outcome.SURVIVED


@attack("running")
def two_runs_share_a_checkpoint_address(trial: Trial) -> Outcome:
    """Two run folders name the same checkpoint.path, at once or one after the other: the second is refused."""
    shared, first, second = trial.folder / "shared", trial.folder / "first", trial.folder / "second"
    spelled = trial.random.choice([str(shared), f"file://{shared}", f"{shared}/", f"{trial.folder}/./shared"])
    other = trial.random.choice(
        [(), ("training.seed=7",), ("optimizer.learning_rate=0.01",), (f"training.train_steps={STEPS + 10}",)]
    )
    at_once = trial.random.random() < 0.5
    trial.did(f"{'at once' if at_once else 'one after the other'}; the second with {spelled} {' '.join(other)}")
    if at_once:
        ranks, flag = started_until(trial, first, 7, f"checkpoint.path={shared}")
        told = trial.train(second, ONE, f"checkpoint.path={spelled}", *other)
        flag.unlink()
        ended = ranks.wait(HANG_LIMIT_S)
    else:
        tamper = in_step(14, lambda: os.kill(os.getpid(), signal.SIGKILL))
        trial.train(first, ONE, f"checkpoint.path={shared}", tamper=tamper)
        told = trial.train(second, ONE, f"checkpoint.path={spelled}", *other)
        ended = trial.train(first, ONE, f"checkpoint.path={shared}")
    check_ending(told)
    check_ending(ended)
    if told.statuses != [2]:
        raise Lost(f"the second run ended with {told.statuses}: {told.text[-200:]!r}")
    (first / "checkpoints").symlink_to(shared)
    survived(first, trial)
    return Outcome.NAMED


@attack("running")
def reader_while_running(trial: Trial) -> Outcome:
    """train.evaluate and train.figures look at a run while it trains, and disturb nothing."""
    run = trial.folder / "run"
    ranks, flag = started_until(trial, run, trial.random.randint(6, STEPS))
    for command in trial.random.sample(["train.evaluate", "train.figures"], 1):
        trial.did(command)
        looked = trial.command(command, "--run", str(run))
        check_ending(looked)
    flag.unlink()
    ended = ranks.wait(HANG_LIMIT_S, FAST_END_S)
    if judged(run, trial, ended) is not Outcome.SURVIVED:
        raise Lost(f"the run ended with {ended.statuses}: {ended.text[-300:]}")
    json.loads((run / "config.json").read_text())
    return Outcome.SURVIVED
