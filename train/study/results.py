"""What the runs of a suite gave: one record for each result, from its folder and from counting."""

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
        label: of the suite's run; records that differ in seed alone share it and `tokens`.
        planned_tokens: of the whole run.
        tokens: that it has seen.
        data: address of its dataset; losses on different ones are not comparable.
        parameters, body_parameters: all, and without word and position embeddings and the head.
        flops: of training as far as it got.
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
        """None where the vocabulary is unknown."""
        return private_inference_cost(self.model, self.vocab_size) if self.vocab_size else None


def records(suite: Suite) -> list[Record]:
    """Every result of the suite, also of runs that have not begun."""
    return [record for run in suite.runs for record in _of_run(run)]


def _of_run(run: PlannedRun) -> Iterable[Record]:
    lost: State | None = None
    for stage in run.stages:
        state = read_state(stage) if lost is None else lost
        if state.word in ("diverged", "other") and lost is None and not stage.is_result:
            lost = state  # such a trunk has no further branches
        if stage.is_result:
            yield _record(run, stage, state)


def _record(run: PlannedRun, stage: Stage, state: State) -> Record:
    config = stage.config
    noted = {} if state.word == "other" else description(stage.folder)
    vocab_size = vocabulary(noted, config)
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


def vocabulary(noted: dict[str, Any], config: Config) -> int:
    """Tokens as the run noted them, else of the dataset, else as planned; 0 where none of them is known."""
    size = noted.get("vocab_size")  # not by runs that have not begun, nor by earlier versions
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
        """The one whose pictures stand for the group: finished if any is."""
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
        """Mean perplexity over seeds and half the width of Student's interval; None for the latter with one seed."""
        return student(self.perplexities, level)


def student(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None] | None:
    """Mean and half the width of Student's interval of it; None for the latter with one value, None without any."""
    if len(values) < 2:
        return (values[0], None) if values else None
    from scipy.stats import t

    return mean(values), float(t.ppf(0.5 + level / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def grouped(found: Iterable[Record]) -> list[Group]:
    """By label and budget, in the suite's order."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in found:
        groups.setdefault((record.label, record.planned_tokens), []).append(record)
    return [Group(tuple(members)) for members in groups.values()]
