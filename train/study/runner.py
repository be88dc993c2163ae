"""Runs the stages of a suite, each as a process of train/main.py, and says where every run stands.

What a run has reached is read from its own files, so that a study that was stopped goes on where it was, and one that
other jobs work on at the same time is seen as it is.
"""

import datetime
import fcntl
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError, printable
from data.stream.dataset import open_dataset_once
from train.run.folder import RunError, read_config, read_fingerprint, read_rows, write_atomically
from train.study.suite import PlannedRun, Stage, Suite

Say = Callable[[str], None]
MustEnd = Callable[[], bool]
POLL_S = 0.1
GAVE_UP = re.compile(r"error: (step \d+: [^;]*)")  # how the trainer ends a run that has diverged
RESULT_KEYS = ("model", "regularizer", "optimizer", "training.seed", "training.global_batch_size",
               "training.micro_batch_size")  # fmt: skip
"""Sections and keys that fix a result; length, layout and logging may change while a run goes on."""
MAIN = Path(__file__).resolve().parents[1] / "main.py"


@dataclass(frozen=True)
class State:
    """Where a stage stands.

    Attributes:
        word: new, running, partial, done, diverged or failed; other where the folder holds another configuration's run.
        step: last step with a row.
        loss: of the final evaluation in nats a token, for a stage that is done.
        detail: of a run that diverged, failed or is another, one line.
    """

    word: str
    step: int = 0
    loss: float | None = None
    detail: str = ""

    @property
    def is_final(self) -> bool:
        return self.word in ("done", "diverged")

    @property
    def can_train(self) -> bool:
        return self.word in ("new", "partial", "failed")


def read_state(stage: Stage) -> State:
    """Reads a stage's folder."""
    try:
        if difference := difference_from(stage):
            return State("other", detail=f"{difference}; give the suite another folder: output=DIR")
        return _reached(stage)
    except (RunError, OSError) as error:
        return State("failed", detail=printable(str(error)))


def difference_from(stage: Stage) -> str:
    """The first key in which the run in a stage's folder is another than the stage's, with both values; '' if none."""
    there, here = read_config(stage.folder) or {}, stage.config.as_dict()
    for place in RESULT_KEYS:
        section, _, only = place.partition(".")
        theirs = there.get(section, {})
        if not isinstance(theirs, dict):
            raise RunError(f"{stage.folder}/config.json: {section} is {theirs!r}, expected an object; restore the file")
        for key in [only] if only else here[section]:
            if key in theirs and theirs[key] != here[section][key]:  # earlier versions noted fewer keys
                return f"{section}.{key} is {theirs[key]!r} in {stage.folder} and {here[section][key]!r} here"
    their_path, our_path = there.get("data", {}).get("path", stage.config.data.path), stage.config.data.path
    if their_path != our_path and is_other_data(stage):
        return f"data.path is {their_path!r} in {stage.folder} and {our_path!r}, which holds other data, here"
    return ""


def is_other_data(stage: Stage) -> bool:
    """Whether the run in a stage's folder reads other data than the stage.

    A dataset that was moved is the same one, and what cannot be read here is taken for it.
    """
    theirs = read_fingerprint(stage.folder)
    try:
        ours = open_dataset_once(stage.config.data.path, stage.config.data.read_options()).fingerprint
    except DataError:
        return False
    return theirs is not None and theirs != ours


def _reached(stage: Stage) -> State:
    file = stage.folder / "metrics.jsonl"
    rows = read_rows(file)
    steps = [(int(row["step"]), number(file, row, "loss")) for row in rows if "loss" in row]
    last = steps[-1][0] if steps else 0
    if is_locked(stage.folder):
        return State("running", last)
    if not rows and file.exists() and file.stat().st_size:
        raise RunError(f"{file}: no line of it is a row of a step; restore it, or delete the folder to begin anew")
    target = stage.config.train_steps
    if stage.is_result and last > target:
        words = f"training.train_steps is at least {last} in {stage.folder} and {target} here"
        return State("other", detail=f"{words}; give the suite another folder: output=DIR")
    final = [row for row in rows if "validation_loss" in row and row["step"] >= target]
    if final or (not stage.is_result and target in complete_steps(stage.folder)):
        loss = number(file, final[-1], "validation_loss") if final else None
        if final and loss is None:
            return State("diverged", target, None, f"the validation loss at step {target} is not finite")
        return State("done", last, loss)
    failure = stage.folder / "failure.txt"
    words = printable(failure.read_text(encoding="utf-8", errors="replace").strip()) if failure.exists() else ""
    if GAVE_UP.search(words) or (steps and steps[-1][1] is None):
        step = next((step for step, loss in steps if loss is None), last)
        return State("diverged", step, None, divergence(stage.folder, step, words))
    if words:
        return State("failed", last, None, words)
    return State("partial" if steps else "new", last)


def number(file: Path, row: dict[str, Any], key: str) -> float | None:
    """A number of a row; None where it is not finite, for which the trainer writes null."""
    value = row[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"step {row['step']}: {key} is {json.dumps(value)[:40]}"
        raise RunError(f"{file}: {found}, expected a number; remove that line or restore the file")
    return float(value) if abs(value) <= sys.float_info.max else None


def divergence(folder: Path, step: int, words: str) -> str:
    """Where a run was lost, how many heads of which layers were NaN, and what had collapsed before."""
    heads = [row for row in read_rows(folder / "entropy.jsonl") if is_head_map(row.get("entropy_nats"))]
    counts = nan_heads(heads[-1]["entropy_nats"]) if heads else []
    layers = [str(layer) for layer, count in enumerate(counts) if count]
    gave_up = GAVE_UP.search(words)
    parts = [gave_up[1] if gave_up else f"step {step}: the loss is not finite"]
    if layers:
        parts.append(f"{sum(counts)} NaN heads, first in layer {layers[0]}")
    finite = [row for row in heads if not any(nan_heads(row["entropy_nats"]))]
    if finite:
        means = [sum(layer) / len(layer) for layer in finite[-1]["entropy_nats"]]
        collapsed = [layer for layer, mean in enumerate(means) if mean < 0.05]
        if collapsed:
            parts.append(f"entropy below 0.05 nats from layer {collapsed[0]} at step {finite[-1]['step']}")
    return "; ".join(parts)


def is_head_map(value: Any) -> bool:
    """Whether each layer has a number or null for each of its heads; what a damaged row holds has not."""
    return isinstance(value, list) and all(
        isinstance(layer, list) and layer and all(head is None or isinstance(head, int | float) for head in layer)
        for layer in value
    )


def nan_heads(entropy_nats: list[list[float | None]]) -> list[int]:
    """NaN heads of each layer; null stands for what is not finite."""
    return [sum(value is None for value in layer) for layer in entropy_nats]


def is_locked(folder: Path) -> bool:
    """Whether a process trains there now."""
    try:
        with (folder / "run.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who else looks is not taken for a training
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@dataclass(frozen=True)
class Runner:
    """Runs a suite's stages.

    Attributes:
        launcher: the command before train/main.py, say ("deepspeed", "--num_gpus", "8"); empty for one process a run,
            forked from a server that has the libraries loaded (they take longer to load than a small model to train).
        jobs: runs at a time.
        retry: whether runs that diverged are begun anew.
        time_limit_s: after which nothing is started and what runs is ended; 0 for none.
    """

    suite: Suite
    launcher: Sequence[str] = ()
    jobs: int = 1
    retry: bool = False
    time_limit_s: float = 0.0
    say: Say = print

    def run(self, only: str | None = None) -> int:
        """Runs everything unfinished; returns how many runs could not be finished, divergence not counted.

        One seed of every model comes before the next of any, so that a study cut short still compares all models.
        """
        chosen = [run for run in self.suite.runs if only is None or only in (run.name, run.label)]
        runs = sorted(chosen, key=lambda run: run.seed)
        self.suite.output.mkdir(parents=True, exist_ok=True)
        write_environment(self.suite.output)
        stop = threading.Event()
        ends_at = time.monotonic() + self.time_limit_s if self.time_limit_s else math.inf

        def must_end() -> bool:
            return stop.is_set() or time.monotonic() > ends_at

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run, number, len(runs), run, must_end) for number, run in enumerate(runs, 1)]
            try:
                return sum(not future.result() for future in futures)
            finally:
                stop.set()  # after an interrupt the trainings save and end, and the pool waits for them

    def _run(self, number: int, total: int, run: PlannedRun, must_end: MustEnd) -> bool:
        """Trains the stages of a run; whether all reached their end. Only a trunk that is lost stops what follows."""
        finished = True
        for stage in run.stages:
            if must_end():
                return False
            state = read_state(stage)
            where = f"[{number}/{total}] {run.name}" + (f" {stage.folder.name}" if len(run.stages) > 1 else "")
            if state.word == "diverged" and self.retry:
                shutil.rmtree(stage.folder)
                state = read_state(stage)
            if state.can_train:
                self.say(f"{where}: {'resumes at step ' + str(state.step) if state.step else 'starts'}")
                try:
                    self._start(stage, must_end)
                    state = read_state(stage)
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
        """Trains one stage; a process that fails leaves its last words in failure.txt."""
        config_file = prepare(stage)
        start = partial(launched, self.launcher) if self.launcher else forked
        status = start(config_file, stage.folder / "log.txt", must_end)
        if status > 0 and not must_end():
            lines = (stage.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
            last_words = errors[-1] if errors else "no output"
            write_atomically(stage.folder / "failure.txt", f"exit status {status}: {last_words}\n")


def prepare(stage: Stage) -> Path:
    """Makes a stage's folder ready to be trained in; returns its configuration file."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "failure.txt").unlink(missing_ok=True)
    if stage.copied_from is not None:
        branch_off(stage)
    config_file = stage.folder / "stage.json"
    write_atomically(config_file, json.dumps(stage.config.as_dict(), indent=2) + "\n")
    return config_file


def next_stage(run: PlannedRun) -> Stage | None:
    """The first stage that is still to be trained; None where none is or one that others rest on is being trained."""
    for stage in run.stages:
        state = read_state(stage)
        if state.can_train:
            return stage
        if state.word != "done" and not stage.is_result:
            return None
    return None


def launched(launcher: Sequence[str], config_file: Path, log: Path, must_end: MustEnd) -> int:
    """Trains under a launcher until its end or `must_end`, when it saves; returns its exit status, then negative."""
    command = [*launcher, str(MAIN), "--config", str(config_file)]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            process_group=0,  # Ctrl-C goes to the study alone, which has its trainings save and end
        )
        while process.poll() is None:
            if must_end():
                process.terminate()
                return min(-1, process.wait())
            time.sleep(POLL_S)
        return process.returncode


def forked(config_file: Path, log: Path, must_end: MustEnd) -> int:
    """Trains in a process of its own, forked from a server with everything imported; otherwise as `launched`."""
    os.environ.update(environment())
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU then leaves the server forkable
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.study.preload"])
    process = context.Process(target=_train, args=(config_file, log))
    process.start()
    while process.is_alive():
        if must_end():
            process.terminate()
            process.join()
            return -1
        process.join(POLL_S)
    return process.exitcode or 0


def _train(config_file: Path, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the study then has its trainings save and end
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from train.main import main

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the server's number is not inherited
    status = main(["--config", str(config_file)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing of the server's is torn down


def branch_off(stage: Stage) -> None:
    """Gives a branch the trunk's history and newest checkpoint up to the step where it begins; a branch begun stays.

    Until that step both have the same rate, so that a branch may begin earlier, or at 0 where the trunk keeps no
    checkpoint, and be the same run.
    """
    assert stage.copied_from is not None
    earlier = [step for step in complete_steps(stage.copied_from) if step <= stage.copied_step]
    if complete_steps(stage.folder) or not earlier:
        return
    for file in ("metrics.jsonl", "entropy.jsonl"):  # before the checkpoint, which says that a branch has begun
        shutil.copyfile(stage.copied_from / file, stage.folder / f"{file}.tmp")
        os.replace(stage.folder / f"{file}.tmp", stage.folder / file)  # resuming cuts it back to the checkpoint's step
    name = f"step_{max(earlier):08d}"
    unfinished = stage.folder / "checkpoints" / f"{name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(stage.copied_from / "checkpoints" / name, unfinished, copy_function=_link_or_copy)
    os.replace(unfinished, unfinished.with_name(name))


def complete_steps(folder: Path) -> list[int]:
    """Steps of a run's complete checkpoints."""
    markers = (folder / "checkpoints").glob("step_*[0-9]/checkpoint.json")
    return [int(marker.parent.name.removeprefix("step_")) for marker in markers]


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # a checkpoint is never written to once complete
    except OSError:
        shutil.copyfile(source, target)


def environment() -> dict[str, str]:
    """One thread a process where several share the cores, unless the user has set it."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def write_environment(output: Path) -> None:
    """What the report says of the machine: written when runs begin, since the report may be made elsewhere."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    row = {"device": device, "torch": torch.__version__, "machine": platform.machine(),
           "date": datetime.date.today().isoformat()}  # fmt: skip
    write_atomically(output / "environment.json", json.dumps(row, indent=1) + "\n")
