"""Run the stages of a suite, each as a process of train/main.py."""

import dataclasses
import datetime
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.run.names import FAILURE, LOG
from train.study.launch import MustEnd, forked, launched
from train.study.reading import ENVIRONMENT
from train.study.stages import discard, prepare
from train.study.state import State, read_state
from train.study.suite import PlannedRun, Stage, Suite

Say = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """Runs a suite's stages.

    Attributes:
        suite: its runs.
        launcher: the command before train/main.py, say ("deepspeed", "--num_gpus", "8"). If empty, each run is one
            process, forked from a server that has the libraries loaded: loading takes longer than training a small
            model.
        jobs: number of runs at a time.
        retry: whether to start runs anew that diverged.
        time_limit_s: seconds after which nothing is started and running trainings are ended; 0 for no limit. Once a
            run of the same size and length has finished here, none is started that would take longer than is left.
        say: prints a line about a run.
    """

    suite: Suite
    launcher: Sequence[str] = ()
    jobs: int = 1
    retry: bool = False
    time_limit_s: float = 0.0
    say: Say = print

    def run(self, only: Sequence[str] = ()) -> int:
        """Run everything unfinished.

        The first seed of every model comes before the second of any, so that a study cut short compares all models.

        Args:
            only: names, labels or arms of the runs to run, in this order; none runs all.

        Returns:
            How many runs could not be finished. A run that diverged is finished.
        """
        runs = self.suite.chosen(only)
        self.suite.output.mkdir(parents=True, exist_ok=True)
        write_environment(self.suite.output)
        stop = threading.Event()
        clock = Clock(time.monotonic() + self.time_limit_s if self.time_limit_s else math.inf)

        def must_end() -> bool:
            return stop.is_set() or clock.left_s() < 0

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [
                pool.submit(self._run, number, len(runs), run, must_end, clock) for number, run in enumerate(runs, 1)
            ]
            try:
                return sum(not future.result() for future in futures)
            finally:
                stop.set()  # after an interrupt the trainings save and end, and the pool waits for them

    def _run(self, number: int, total: int, run: PlannedRun, must_end: MustEnd, clock: "Clock") -> bool:
        """Train the stages of a run; return whether all reached their end. A lost trunk alone stops later stages."""
        finished = True
        for stage in run.stages:
            state = read_state(stage)
            where = f"[{number}/{total}] {run.name}" + (f" {stage.folder.name}" if len(run.stages) > 1 else "")
            if state.word == "diverged" and self.retry:
                discard(stage)
                stage = dataclasses.replace(stage, saved=None)
                state = read_state(stage)
            if state.can_train:
                left_s, needed_s = clock.left_s(), clock.needed_s(stage, state.step)
                if left_s < needed_s:
                    why = f"it would take {needed_s:.0f} s, and {left_s:.0f} s are left" if left_s > 0 else "time is up"
                    self.say(f"{where}: not started ({why})")
                if must_end() or left_s < needed_s:
                    return False
                begun_s = time.monotonic()
                self.say(f"{where}: {'resumes at step ' + str(state.step) if state.step else 'starts'}")
                try:
                    self._start(stage, must_end)
                    begun_at, state = state.step, read_state(stage)
                    if state.word == "done":
                        clock.note(stage, begun_at, time.monotonic() - begun_s)
                except OSError as error:  # a full disk, a folder where a file belongs: of this run, not of the others
                    state = State("failed", state.step, detail=str(error))
            loss = f", validation loss {state.loss:.4f}" if state.loss is not None else ""
            detail = "another process trains it" if state.word == "running" else state.detail
            self.say(f"{where}: {state.word}{loss}" + (f" ({detail})" if detail else ""))
            finished = finished and state.is_final
            if state.word != "done" and not stage.is_result:
                break
        return finished

    def _start(self, stage: Stage, must_end: MustEnd) -> None:
        """Train one stage; if its process fails, write its last error message to failure.txt."""
        arguments = ["--config", str(prepare(stage))]
        if stage.config.data.allow_commands:  # the user's word to the study; no file holds it
            arguments.append("data.allow_commands=true")
        start = partial(launched, self.launcher) if self.launcher else forked
        status = start(arguments, stage.folder / LOG, must_end)
        if status > 0 and not must_end():
            lines = (stage.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
            last = errors[-1] if errors else "no output"
            write_atomically(stage.folder / FAILURE, f"exit status {status}: {last}\n")


class Clock:
    """Knows how much time is left, and how long runs take that finished here.

    Args:
        ends_at: by time.monotonic; infinity for no limit.
    """

    def __init__(self, ends_at: float) -> None:
        self._ends_at = ends_at
        self._seconds_a_step: dict[tuple[int, ...], float] = {}

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self._ends_at - time.monotonic()

    def note(self, stage: Stage, begun_at: int, seconds: float) -> None:
        """Record how long a stage took that has finished, from the step where it began."""
        steps = stage.config.train_steps - begun_at
        if steps > 0:
            key = _size(stage)
            self._seconds_a_step[key] = max(self._seconds_a_step.get(key, 0.0), seconds / steps)

    def needed_s(self, stage: Stage, begun_at: int) -> float:
        """Return how long a stage will take: as long as the slowest of its size and length; 0 if none has finished."""
        return self._seconds_a_step.get(_size(stage), 0.0) * (stage.config.train_steps - begun_at)


def _size(stage: Stage) -> tuple[int, ...]:
    model, training = stage.config.model, stage.config.training
    batch = (training.micro_batch_size, training.global_batch_size)
    return (model.num_layers, model.hidden_size, model.seq_length, *batch, stage.config.train_steps)


def write_environment(output: Path) -> None:
    """Record the machine for the report, which may be made on another one."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    row = {"device": device, "torch": torch.__version__, "machine": platform.machine(),
           "date": datetime.date.today().isoformat()}  # fmt: skip
    write_atomically(output / ENVIRONMENT, to_json(row, indent=1) + "\n")
