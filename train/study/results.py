"""Collect the results of a suite: one record for each, with counts and costs of its model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from data.errors import DataError
from data.stream.dataset import open_dataset
from model.config import ModelConfig
from train.config import Config
from train.cost.flops import training_flops_per_token
from train.cost.parameters import body_parameters, total_parameters
from train.paper import Row
from train.private_inference import PrivateInferenceCost, private_inference_cost
from train.run.reader import RunError, RunReader
from train.study.state import State, read_state
from train.study.suite import PlannedRun, Stage, Suite


@dataclass(frozen=True)
class Record:
    """One result: a run of one seed and one budget.

    Attributes:
        label: of the suite's run; records that differ in seed alone share it and `planned_tokens`.
        planned_tokens: tokens of the whole run.
        tokens: tokens seen so far.
        data: address of its dataset; losses on different datasets do not compare.
        vocab_size: 0 if it is unknown.
        parameters: all parameters.
        body_parameters: those of the blocks and the final norm, without embeddings and head.
        flops: training FLOPs spent so far.
    """

    label: str
    seed: int
    folder: Path
    model: ModelConfig
    row: Row | None
    state: State
    planned_tokens: int
    tokens: int
    data: str
    vocab_size: int
    parameters: int
    body_parameters: int
    flops: float

    @property
    def loss(self) -> float | None:
        return self.state.loss if self.state.word == "done" else None

    @property
    def perplexity(self) -> float | None:
        return math.exp(self.loss) if self.loss is not None and self.loss < 700 else None

    @property
    def cost(self) -> PrivateInferenceCost | None:
        """Predicted cost of private inference; None if the vocabulary is unknown."""
        return private_inference_cost(self.model, self.vocab_size) if self.vocab_size else None


def records(suite: Suite) -> list[Record]:
    """Return every result of the suite, including those of runs that have not begun."""
    return [record for run in suite.runs for record in _of_run(run)]


def _of_run(run: PlannedRun) -> Iterable[Record]:
    lost: State | None = None
    for stage in run.stages:
        state = read_state(stage) if lost is None else lost
        if state.word in ("diverged", "other") and lost is None and not stage.is_result:
            lost = state  # a lost trunk has no further branches
        if stage.is_result:
            yield _record(run, stage, state)


def _record(run: PlannedRun, stage: Stage, state: State) -> Record:
    config = stage.config
    described = {} if state.word == "other" else description(stage.folder)
    vocab_size = vocabulary(described, config)
    known_size = max(vocab_size, 1)
    tokens = state.step * config.tokens_per_step
    return Record(
        label=run.label,
        seed=run.seed,
        folder=stage.folder,
        model=config.model,
        row=run.row,
        state=state,
        planned_tokens=config.train_steps * config.tokens_per_step,
        tokens=tokens,
        data=config.data.path,
        vocab_size=vocab_size,
        parameters=total_parameters(config.model, known_size),
        body_parameters=body_parameters(config.model, known_size),
        flops=float(tokens) * training_flops_per_token(config.model, vocab_size),
    )


def vocabulary(described: dict[str, Any], config: Config) -> int:
    """Return the vocabulary that the run recorded, else the dataset's, else the planned one; 0 if none is known."""
    size = described.get("vocab_size")  # runs that have not begun, and earlier versions, have none
    if type(size) is int and 0 < size < 2**31:
        return size
    try:
        return int(open_dataset(config.data.path).vocab_size)
    except DataError:
        return config.data.planned_vocab_size or 0


def description(folder: Path) -> dict[str, Any]:
    """Return a run's config.json; empty if the run has not begun or the file is damaged."""
    try:
        return RunReader(folder).description() or {}
    except RunError:
        return {}


@dataclass(frozen=True)
class Group:
    """Records that differ in seed alone."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """The record whose pictures stand for the group: a finished one if there is any."""
        return next((record for record in self.records if record.loss is not None), self.records[0])

    @property
    def label(self) -> str:
        return self.records[0].label

    @property
    def perplexities(self) -> list[float]:
        return [record.perplexity for record in self.records if record.perplexity is not None]

    @property
    def diverged(self) -> int:
        return sum(record.state.word == "diverged" for record in self.records)

    @property
    def unfinished(self) -> int:
        return sum(not record.state.is_final for record in self.records)

    def mean_and_half_width(self, level: float = 0.95) -> tuple[float, float | None] | None:
        """Return mean perplexity over seeds and half the width of its interval, as `student`."""
        return student(self.perplexities, level)


def student(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None] | None:
    """Return the mean and half the width of Student's interval for it.

    Returns:
        (mean, None) for one value; None without values.
    """
    if len(values) < 2:
        return (values[0], None) if values else None
    from scipy.stats import t

    return mean(values), float(t.ppf(0.5 + level / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def grouped(found: Iterable[Record]) -> list[Group]:
    """Group records by label and budget, in the suite's order."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in found:
        groups.setdefault((record.label, record.planned_tokens), []).append(record)
    return [Group(tuple(members)) for members in groups.values()]
