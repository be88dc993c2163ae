"""Kills: of a rank, of all, of the launcher, by signals, at any moment; and a start under another layout after one."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.torture.attack import FAST_END_S, Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, judged
from tests.torture.processes import Tamper
from tests.torture.stand import HANG_LIMIT_S, LAYOUTS, STEPS, TP2, Layout, killed_in_step

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
MANY_CHANGES = 60
"""About so many changes to files does one process of a run make."""


def killed_before_change(number: int, folder: str, on_rank: int) -> Tamper:
    """kill -9 by itself before its change `number` to a file or folder below `folder`."""

    def tamper(rank: int) -> None:
        seen = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal seen
            writes = event in CHANGES or (
                event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes and str(args[0]).startswith(folder):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        if rank == on_rank:
            sys.addaudithook(watch)

    return tamper


def finished(trial: Trial, layout: Layout) -> Outcome:
    """Start a killed run again and let it end; only the end of an uninterrupted run will do."""
    ended = trial.train(trial.folder / "run", layout)
    if judged(trial.folder / "run", trial, ended, layout) is not Outcome.SURVIVED:
        raise Lost(f"a killed run is refused: {ended.text[-300:]}")
    if "damaged checkpoint" in (trial.folder / "run/journal.jsonl").read_text():
        raise Lost("a kill left a damaged checkpoint")
    return Outcome.SURVIVED


@attack("kills")
def kill_before_a_change_of_files(trial: Trial) -> Outcome:
    """kill -9 of a rank right before it changes a file, once or twice, saves and starts included."""
    layout = trial.random.choice(LAYOUTS[:2])
    run = trial.folder / "run"
    for _ in range(trial.random.randint(1, 2)):
        rank, number = trial.random.randrange(layout.world_size), trial.random.randint(1, MANY_CHANGES)
        if rank:
            number = trial.random.randint(1, 5)  # the others write nothing but their part of checkpoints
        trial.did(f"{layout.name}: rank {rank} killed before change {number}")
        check_ending(trial.train(run, layout, tamper=killed_before_change(number, str(run), rank)))
    return finished(trial, layout)


@attack("kills")
def kill_ranks_in_a_step(trial: Trial) -> Outcome:
    """kill -9 of one rank or of all at the start of a step, up to three times."""
    layout = trial.random.choice(LAYOUTS)
    run = trial.folder / "run"
    for _ in range(trial.random.randint(1, 3)):
        number = trial.random.randint(1, STEPS)
        rank = trial.random.choice([None, *range(layout.world_size)])
        trial.did(f"{layout.name}: rank {'all' if rank is None else rank} killed in step {number}")
        check_ending(trial.train(run, layout, tamper=killed_in_step(number, rank)))
    return finished(trial, layout)


@attack("kills")
def kill_at_a_moment(trial: Trial) -> Outcome:
    """kill -9 or SIGTERM to some ranks at any moment (the moment alone is not repeated by the seed)."""
    layout = trial.random.choice(LAYOUTS[:2])
    run = trial.folder / "run"
    for _ in range(trial.random.randint(1, 3)):
        ranks, number = trial.start(run, layout), trial.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        victims = trial.random.choice([[0], [layout.world_size - 1], range(layout.world_size)])
        moment = trial.random.uniform(0, 4)
        trial.did(f"{layout.name}: {number.name} to {list(victims)} after {moment:.2f} s")
        time.sleep(moment)
        for victim in victims:
            ranks.kill(victim, number)
        ended = ranks.wait(HANG_LIMIT_S, FAST_END_S)
        if number is not signal.SIGKILL:
            ended.statuses[:] = [1 if status in (-10, -12) else status for status in ended.statuses]
        check_ending(ended)
    return finished(trial, layout)


@attack("kills")
def kill_one_and_leave_the_other_alone(trial: Trial) -> Outcome:
    """kill -9 of one rank; the other has to end by itself, with a message."""
    victim, number = trial.random.randrange(2), trial.random.randint(1, STEPS)
    trial.did(f"rank {victim} killed in step {number}")
    ended = trial.start(trial.folder / "run", TP2, tamper=killed_in_step(number, victim)).wait(HANG_LIMIT_S)
    check_ending(ended)
    if ended.statuses[1 - victim] not in (1, 4) or "error:" not in ended.outputs[1 - victim]:
        raise Lost(f"the other rank ended with {ended.statuses[1 - victim]}: {ended.outputs[1 - victim][-300:]}")
    return finished(trial, TP2)


def slow_steps(rank: int) -> None:
    """Make every step take a fifth of a second longer, so that a run lasts."""
    from parallel.engine.engine import Engine

    step = Engine.train_step

    def slow(self: Engine, *args: object) -> object:
        time.sleep(0.2)
        return step(self, *args)  # type: ignore[arg-type]

    Engine.train_step = slow  # type: ignore[method-assign,assignment]


@attack("kills")
def second_signal(trial: Trial) -> Outcome:
    """SIGTERM twice, 0.5 s apart, while the other rank is stopped: the process has to end at once."""
    ranks = trial.start(trial.folder / "run", TP2, tamper=slow_steps)
    victim, moment = trial.random.randrange(2), trial.random.uniform(0, 4)
    number = trial.random.choice([signal.SIGTERM, signal.SIGUSR1])
    trial.did(f"rank {1 - victim} stopped after {moment:.2f} s, {number.name} twice to rank {victim}")
    time.sleep(moment)
    ranks.until(lambda: _handles(ranks.pids[victim], number), 30)
    ranks.kill(1 - victim, signal.SIGSTOP)
    ranks.kill(victim, number)
    time.sleep(0.5)
    asked = time.monotonic()
    ranks.kill(victim, number)
    while victim in ranks._running() and time.monotonic() - asked < 8:
        time.sleep(0.05)
    hangs = victim in ranks._running()
    ranks.kill(1 - victim, signal.SIGCONT)
    for rank in range(2):
        ranks.kill(rank, signal.SIGKILL)
    ranks.wait(10, 0)
    if hangs:
        raise Lost("a second signal does not end the process")
    return finished(trial, TP2)


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal yet."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


@attack("layouts")
def resume_under_another_layout(trial: Trial) -> Outcome:
    """A killed run goes on under another layout: the same curve within rounding."""
    first, then = trial.random.sample(LAYOUTS, 2)
    trial.did(f"{first.name}, then {then.name}")
    run = trial.half_done(first)
    ended = trial.train(run, then)
    if judged(run, trial, ended, then, like=first) is not Outcome.SURVIVED:
        raise Lost(f"refused: {ended.text[-300:]}")
    return Outcome.SURVIVED


@attack("layouts")
def evaluate_whatever_layout_trained(trial: Trial) -> Outcome:
    """train.evaluate gives the loss that the last row of metrics.jsonl has."""
    layout = trial.random.choice(LAYOUTS)
    trial.did(layout.name)
    run = trial.half_done(layout)
    check_ending(trial.train(run, layout))
    ended = trial.command("train.evaluate", "--run", str(run))
    check_ending(ended)
    if ended.statuses != [0]:
        raise Lost(f"refused: {ended.text[-300:]}")
    found = json.loads((run / "evaluation.json").read_text())["validation_loss"]
    expected = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    if abs(found / expected - 1) > 1e-5:
        raise Lost(f"validation loss {found}, but metrics.jsonl has {expected}")
    return Outcome.SURVIVED
