"""Choose each arm's best value of a swept key on one half of the validation split, and report the other half.

The half on which the best of many values is chosen flatters it. So the choice and the report never see the same text.
A run is lost if it diverges, or if its loss ends at ln V nats or above: a uniform guess over V tokens has ln V. Lost
runs stay in every mean, with the loss ln V.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

import numpy as np

from train.study.results import Record, student
from train.study.statistics.hypotheses import curve_of


@dataclass(frozen=True)
class Trial:
    """One finished run of a curve.

    Attributes:
        seed: of the run.
        value: of the swept key; None if nothing is swept.
        whole: loss over the whole validation split, nats a token.
        first: over the half on which values are chosen.
        second: over the half that is reported.
        is_lost: whether it diverged, or ended at ln V or above.
        record: the result.
    """

    seed: int
    value: Any
    whole: float
    first: float
    second: float
    is_lost: bool
    record: Record


@dataclass(frozen=True)
class Best:
    """The best value of a curve.

    Attributes:
        value: with the lowest mean over seeds on the first half.
        loss: mean over seeds on the second half, nats a token.
        half_width: of its 95% interval over seeds; None for one seed.
        seeds: how many.
        at_edge: whether no larger, or no smaller, number was tried: then the best may lie beyond.
        fitted: place and loss of the lowest point of a parabola in the value's logarithm through the best value and its
            neighbours; None if one is missing or has lost runs.
    """

    value: Any
    loss: float
    half_width: float | None
    seeds: int
    at_edge: bool
    fitted: tuple[float, float] | None


@dataclass(frozen=True)
class Curve:
    """Runs of one arm and budget that differ in seed and in the value of one key.

    Attributes:
        name: of the arm, and values of other keys that are swept.
        key: that is swept; None if nothing is.
        records: all of them, finished or not.
    """

    name: str
    key: str | None
    records: tuple[Record, ...]

    @property
    def planned_tokens(self) -> int:
        return self.records[0].planned_tokens

    @cached_property
    def trials(self) -> list[Trial]:
        """The finished runs."""
        return [_trial(record) for record in self.records if record.state.is_final]

    @property
    def unfinished(self) -> int:
        return len(self.records) - len(self.trials)

    @property
    def lost(self) -> int:
        return sum(trial.is_lost for trial in self.trials)

    @property
    def has_halves(self) -> bool:
        """Whether every run that did not diverge has measured both halves."""
        return all(trial.record.outcome.halves is not None for trial in self.trials if trial.record.loss is not None)

    @cached_property
    def values(self) -> list[Any]:
        """The values that are planned, as `in_order`."""
        return in_order(curve_of(record.arm, record.swept)[2] for record in self.records) if self.key else []

    def at(self, value: Any) -> list[Trial]:
        """Return the finished runs at a value."""
        return [trial for trial in self.trials if trial.value == value]

    @cached_property
    def best(self) -> Best | None:
        """The best value; None if nothing is swept, or a value has no run with a seed that all values have finished."""
        seeds = [{trial.seed for trial in self.at(value)} for value in self.values]
        common = set.intersection(*seeds) if seeds else set()
        if not common or not self.key:
            return None
        firsts = [mean(trial.first for trial in self.at(value) if trial.seed in common) for value in self.values]
        place = min(range(len(firsts)), key=lambda index: firsts[index])
        seconds = [trial.second for trial in self.at(self.values[place])]
        spread = student(seconds)
        assert spread is not None
        is_outer = place in (0, len(self.values) - 1)
        fitted = None if is_outer else self._fitted(place, firsts)
        at_edge = is_outer and are_numbers(self.values)
        return Best(self.values[place], spread[0], spread[1], len(seconds), at_edge, fitted)

    def _fitted(self, place: int, firsts: list[float]) -> tuple[float, float] | None:
        values = self.values[place - 1 : place + 2]
        trials = [self.at(value) for value in values]
        if not are_numbers(values) or values[0] <= 0:
            return None
        if any(trial.is_lost for group in trials for trial in group):
            return None
        logs = np.log(np.array(values, dtype=float))
        curvature, rise, _ = np.polyfit(logs - logs[1], firsts[place - 1 : place + 2], 2)
        if curvature <= 0:
            return None
        lowest = -rise / (2 * curvature)
        reported = np.polyfit(logs - logs[1], [mean(trial.second for trial in group) for group in trials], 2)
        return float(np.exp(logs[1] + lowest)), float(np.polyval(reported, lowest))

    def limit(self, within_nats: float | None) -> float:
        """Return the loss above which a run is lost: so far above the lowest mean of any value; None: no such loss."""
        if within_nats is None:
            return math.inf
        groups = [self.at(value) for value in self.values] or [self.trials]
        return (
            min((mean(trial.whole for trial in trials) for trials in groups if trials), default=math.inf) + within_nats
        )

    def largest_stable(self, within_nats: float | None = None) -> Any:
        """Return the largest value at which, and below which, all runs are finished and none is lost.

        Args:
            within_nats: as in `limit`.

        Returns:
            None if there is none, or if values are no numbers.
        """
        largest, limit = None, self.limit(within_nats)
        for value in self.values if are_numbers(self.values) else []:
            planned = sum(curve_of(record.arm, record.swept)[2] == value for record in self.records)
            trials = self.at(value)
            if len(trials) < planned or any(trial.is_lost or trial.whole > limit for trial in trials):
                break
            largest = value
        return largest


def are_numbers(values: Iterable[Any]) -> bool:
    """Return whether one value can be larger than another: words and switches cannot."""
    return all(type(value) in (int, float) for value in values)


def in_order(values: Iterable[Any]) -> list[Any]:
    """Return each value once: numbers from the smallest to the largest, others as they come."""
    found = list(dict.fromkeys(values))
    return sorted(found) if are_numbers(found) else found


def value_text(value: Any) -> str:
    """Format a value of a swept key."""
    return f"{value:g}" if are_numbers([value]) else str(value)


def _trial(record: Record) -> Trial:
    nothing_known = math.log(record.vocab_size) if record.vocab_size > 1 else math.inf
    loss, value = record.loss, curve_of(record.arm, record.swept)[2]
    if loss is None or loss >= nothing_known:
        return Trial(record.seed, value, nothing_known, nothing_known, nothing_known, True, record)
    first, second = record.outcome.halves or (loss, loss)
    return Trial(record.seed, value, loss, first, second, False, record)


def curves_of(found: Iterable[Record]) -> list[Curve]:
    """Divide records into curves, in the suite's order."""
    groups: dict[tuple[str, str | None, int], list[Record]] = {}
    for record in found:
        name, key, _ = curve_of(record.arm, record.swept)
        groups.setdefault((name, key, record.planned_tokens), []).append(record)
    return [Curve(name, key, tuple(members)) for (name, key, _), members in groups.items()]
