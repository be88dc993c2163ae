"""Collect the results of a suite: one record for each, with counts and costs of its model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from model.config import ModelConfig
from train.cost.flops import training_flops_per_token
from train.cost.parameters import body_parameters, total_parameters
from train.paper import Row
from train.private_inference import PrivateInferenceCost, private_inference_cost
from train.study.outcome import Outcome
from train.study.reading import description, outcome_in, vocabulary
from train.study.state import State, read_state
from train.study.suite import PlannedRun, Stage, Suite


@dataclass(frozen=True)
class Record:
    """One result: a run of one seed and one budget.

    Attributes:
        label: of the suite's run; records that differ in seed alone share it and `planned_tokens`.
        arm: the suite's entry; records that differ in seed and in what is swept share it.
        swept: value of each key that the entry sweeps.
        stage: the training that ends in it.
        output: the suite's folder.
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
    arm: str
    swept: dict[str, Any]
    stage: Stage
    output: Path
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
    def folder(self) -> Path:
        return self.stage.folder

    @cached_property
    def outcome(self) -> Outcome:
        """All that a report shows of it, saved or read from its folder."""
        return self.state.saved or outcome_in(self.stage, self.state, self.output)

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
    return [record for run in suite.runs for record in _of_run(run, suite.output)]


def _of_run(run: PlannedRun, output: Path) -> Iterable[Record]:
    lost: State | None = None
    for stage in run.stages:
        state = read_state(stage) if lost is None else lost
        if state.word in ("diverged", "other") and lost is None and not stage.is_result:
            lost = state  # a lost trunk has no further branches
        if stage.is_result:
            yield _record(run, stage, state, output)


def _record(run: PlannedRun, stage: Stage, state: State, output: Path) -> Record:
    config, saved = stage.config, state.saved
    described = {} if saved or state.word == "other" else description(stage.folder)
    vocab_size = saved.vocab_size if saved else vocabulary(described, config)
    known_size = max(vocab_size, 1)
    tokens = state.step * config.tokens_per_step
    return Record(
        label=run.label,
        seed=run.seed,
        arm=run.arm,
        swept=run.swept,
        stage=stage,
        output=output,
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


def results_rows(found: list[Record]) -> list[dict[str, Any]]:
    """Return one flat object a result, for programs to read."""
    return [
        {
            "label": record.label,
            "seed": record.seed,
            "architecture": record.model.architecture,
            "state": record.state.word,
            "detail": record.state.detail,
            "step": record.state.step,
            "tokens": record.tokens,
            "planned_tokens": record.planned_tokens,
            "parameters": record.parameters,
            "body_parameters": record.body_parameters,
            "training_flops": record.flops,
            "validation_loss": record.loss,
            "validation_perplexity": record.perplexity,
            "communication_gb": record.cost and record.cost.communication_gb,
            "latency_min": record.cost and record.cost.latency_min,
            "folder": str(record.folder),
        }
        for record in found
    ]
