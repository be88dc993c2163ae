"""Where each training of a suite stands, read from its own folder.

So a study that was stopped goes on where it was, and one that other jobs work on at the same time is seen as it is.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError, printable, redacted
from data.files.strict_json import shown, to_json
from data.stream.dataset import open_dataset_once
from train.run.entropy_words import fallen_layers
from train.run.names import METRICS
from train.run.reader import Row, RunError, RunReader
from train.run.same_run import Use, same_run, same_run_in
from train.study.outcome import Outcome
from train.study.suite import PlannedRun, Stage

GAVE_UP = re.compile(r"error: (step \d+: [^;]*)")  # how the trainer ends a run that has diverged
ANOTHER_FOLDER = "give the suite another folder: output=DIR"


@dataclass(frozen=True)
class State:
    """Where a stage stands.

    Attributes:
        word: new, running, partial, done, diverged or failed; other if the folder holds another configuration's run.
        step: last step with a row.
        loss: of the final evaluation in nats a token, for a stage that is done.
        detail: one line about a run that diverged, failed or is another.
        saved: the saved result that says so; None if the folder does.
    """

    word: str
    step: int = 0
    loss: float | None = None
    detail: str = ""
    saved: Outcome | None = None

    @property
    def is_final(self) -> bool:
        return self.word in ("done", "diverged")

    @property
    def can_train(self) -> bool:
        return self.word in ("new", "partial", "failed")


def read_state(stage: Stage) -> State:
    """Read where a stage stands; a file that is damaged makes it a failed one.

    A saved result stands for a folder that has not come to its end.
    """
    try:
        if difference := difference_from(stage):
            return State("other", detail=f"{difference}; {ANOTHER_FOLDER}")
        state = _reached(stage)
    except (RunError, OSError) as error:
        state = State("failed", detail=printable(str(error)))
    saved = stage.saved
    if saved is None:
        return state
    if difference := saved_difference(stage, saved):
        return State("other", detail=f"{difference}; leave that file out, or give the suite its settings")
    if state.is_final or state.word == "running":
        return state
    return State(saved.word, saved.step, saved.loss, saved.detail, saved)


def next_stage(run: PlannedRun) -> Stage | None:
    """Return the first stage that is still to be trained.

    Returns:
        None if there is none, or if one that later stages rest on is being trained.
    """
    for stage in run.stages:
        state = read_state(stage)
        if state.can_train:
            return stage
        if state.word != "done" and not stage.is_result:
            return None
    return None


def difference_from(stage: Stage) -> str:
    """Return the first key in which the run in a stage's folder differs from the stage, with both values; '' if none.

    Raises:
        RunError: config.json is damaged.
    """
    for each in same_run_in(stage.folder, stage.config.as_dict(), Use.RESULT):
        return f"{each.key} is {each.there!r} in {stage.folder} and {each.here!r} here"
    config, our_path = RunReader(stage.folder).config() or {}, redacted(stage.config.data.path)
    their_path = config.get("data", {}).get("path", our_path)
    if their_path != our_path and is_other_data(stage, RunReader(stage.folder).fingerprint()):
        return f"data.path is {their_path!r} in {stage.folder} and {our_path!r}, which holds other data, here"
    return ""


def saved_difference(stage: Stage, saved: Outcome) -> str:
    """Return the first key in which a saved result differs from the stage, with both values; '' if none."""
    here = stage.config.as_dict()
    for each in same_run(saved.config, here, Use.RESULT):
        return f"{each.key} is {shown(each.there)} in {stage.saved_in} and {shown(each.here)} here"
    if (steps := saved.config["training"]["train_steps"]) != stage.config.train_steps:
        return f"training.train_steps is {steps} in {stage.saved_in} and {stage.config.train_steps} here"
    if saved.fingerprint is not None and is_other_data(stage, saved.fingerprint):
        return f"{stage.saved_in} was made with other data than {redacted(stage.config.data.path)!r} holds here"
    return ""


def is_other_data(stage: Stage, theirs: str | None) -> bool:
    """Return whether a run of another dataset's fingerprint read other data than the stage would.

    A dataset that was moved is the same one. One that cannot be read here is assumed to be the same.
    """
    try:
        ours = open_dataset_once(stage.config.data.path, stage.config.data.read_options()).fingerprint
    except DataError:
        return False
    return theirs is not None and theirs != ours


def _reached(stage: Stage) -> State:
    run, target = RunReader(stage.folder), stage.config.train_steps
    file, rows = stage.folder / METRICS, run.metrics()
    steps = [(row["step"], number(file, row, "loss")) for row in rows if "loss" in row]
    last = steps[-1][0] if steps else 0
    if run.is_training():
        return State("running", last)
    if not rows and file.exists() and file.stat().st_size:
        raise RunError(f"{file}: no line of it is a row of a step; restore it, or delete the folder to begin anew")
    if stage.is_result and last > target:
        difference = f"training.train_steps is at least {last} in {stage.folder} and {target} here"
        return State("other", detail=f"{difference}; {ANOTHER_FOLDER}")
    final = [row for row in rows if "validation_loss" in row and row["step"] >= target]
    if final or (not stage.is_result and target in run.complete_steps()):
        loss = number(file, final[-1], "validation_loss") if final else None
        if final and loss is None:
            return State("diverged", target, None, f"the validation loss at step {target} is not finite")
        return State("done", last, loss)
    failure = printable(run.failure())
    if GAVE_UP.search(failure) or (steps and steps[-1][1] is None):
        step = next((step for step, loss in steps if loss is None), last)
        return State("diverged", step, None, divergence(run, step, failure, stage.config.model.seq_length))
    if failure:
        return State("failed", last, None, failure)
    return State("partial" if steps else "new", last)


def number(file: Path, row: Row, key: str) -> float | None:
    """Return a number of a row; None if it is not finite, for which the trainer writes null.

    Raises:
        RunError: it is something else than a number.
    """
    value = row[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"step {row['step']}: {key} is {to_json(value)[:40]}"
        raise RunError(f"{file}: {found}, expected a number; remove that line or restore the file")
    return float(value) if abs(value) <= sys.float_info.max else None


def divergence(run: RunReader, step: int, failure: str, seq_length: int) -> str:
    """Say where a run diverged, how many heads of which layers were NaN, and which layers had collapsed before."""
    rows = [row for row in run.entropies() if is_head_map(row.get("entropy_nats"))]
    counts = nan_heads(rows[-1]["entropy_nats"]) if rows else []
    gave_up = GAVE_UP.search(failure)
    parts = [gave_up[1] if gave_up else f"step {step}: the loss is not finite"]
    if any(counts):
        parts.append(f"{sum(counts)} NaN heads, first in layer {lost_layer(rows)}")
    finite = [row for row in rows if not any(nan_heads(row["entropy_nats"]))]
    if finite and (collapsed := fallen_layers(finite[-1]["entropy_nats"], seq_length)):
        parts.append(f"entropy collapse from layer {collapsed[0]} at step {finite[-1]['step']}")
    return "; ".join(parts)


def lost_layer(rows: list[Row]) -> int | None:
    """Return the first layer with a NaN head in the last of a run's rows of entropies; None if there is none."""
    counts = nan_heads(rows[-1]["entropy_nats"]) if rows else []
    return next((layer for layer, count in enumerate(counts) if count), None)


def is_head_map(value: Any) -> bool:
    """Return whether each layer has a number or null for each of its heads; a damaged row may hold anything."""
    return isinstance(value, list) and all(
        isinstance(layer, list) and layer and all(head is None or isinstance(head, int | float) for head in layer)
        for layer in value
    )


def nan_heads(entropy_nats: list[list[float | None]]) -> list[int]:
    """Count the NaN heads of each layer; null stands for what is not finite."""
    return [sum(value is None for value in layer) for layer in entropy_nats]
