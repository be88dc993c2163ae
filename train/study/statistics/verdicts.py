"""Judge the hypotheses of a suite by its results.

The seed is the unit: all tests are over seeds that both arms have. p values are adjusted for all hypotheses of the file
together, those without a p included. No verdict is given while runs are unfinished, nor for a best value at the edge of
its sweep.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import mean
from typing import Any

import numpy as np

from train.study.results import Record
from train.study.statistics.hypotheses import OWN_BEST, Hypothesis, Tree, is_at
from train.study.statistics.inference import (
    ALPHA,
    POWER,
    Estimate,
    difference_beyond_p,
    equivalence_p,
    fisher_p,
    holm,
    paired,
    seeds_for_effect,
    seeds_for_equivalence,
    sign_flip_p,
    smallest_effect,
)
from train.study.statistics.sweeps import Curve, Trial, are_numbers, curves_of, value_text

HELD, NOT_HELD, OPEN = "held", "did not hold", "not decided"


@dataclass(frozen=True)
class Finding:
    """What the runs say of a hypothesis, before it is judged in its family.

    Attributes:
        effect: in words, with its interval.
        p: of the test; None if there is no test.
        is_for: whether the effect has the sign, and the size, that is claimed.
        p_against: of the opposite claim; None if it is p itself.
        obstacle: why no verdict can be given; '' if nothing stands against it.
        more: says what would decide at a level of a single test.
        note: what else must be known.
    """

    effect: str
    p: float | None = None
    is_for: bool = False
    p_against: float | None = None
    obstacle: str = ""
    more: Callable[[float], str] = str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """A judged hypothesis; `adjusted` is p after Holm's correction, `reason` says why nothing is decided."""

    hypothesis: Hypothesis
    finding: Finding
    adjusted: float | None
    word: str
    reason: str


def judge(hypotheses: Sequence[Hypothesis], found: Iterable[Record]) -> list[Verdict]:
    """Judge all hypotheses of a suite."""
    curves = curves_of(found)
    findings = [_FINDERS[each.kind](each, curves) for each in hypotheses]
    adjusted = holm([1.0 if finding.p is None else finding.p for finding in findings])
    return [
        _verdict(hypothesis, finding, p, len(findings))
        for hypothesis, finding, p in zip(hypotheses, findings, adjusted, strict=True)
    ]


def _verdict(hypothesis: Hypothesis, finding: Finding, adjusted: float, family: int) -> Verdict:
    if finding.obstacle or finding.p is None:
        p = None if finding.p is None else adjusted
        return Verdict(hypothesis, finding, p, OPEN, finding.obstacle)
    against = adjusted if finding.p_against is None else min(1.0, family * finding.p_against)
    if adjusted < ALPHA and finding.is_for:
        return Verdict(hypothesis, finding, adjusted, HELD, "")
    if against < ALPHA and (finding.p_against is not None or not finding.is_for):
        return Verdict(hypothesis, finding, adjusted, NOT_HELD, "")
    return Verdict(hypothesis, finding, adjusted, OPEN, finding.more(ALPHA / family))


def _of_losses(hypothesis: Hypothesis, curves: list[Curve]) -> Finding:
    """Measure `equivalent` and `better`: the first arm's loss less the second's, for each seed."""
    arms = [_arm(name, hypothesis, curves) for name in hypothesis.arms]
    differences = list(_gaps(arms[0].losses, arms[1].losses).values())
    obstacle, note = _obstacle(arms, len(differences)), _note(arms)
    if not differences or not all(map(math.isfinite, differences)):
        return Finding("-", obstacle=obstacle or "the vocabulary of a diverged run is unknown", note=note)
    if len(differences) < 2:
        return Finding(f"{differences[0]:+.4f} nats", obstacle=obstacle, note=note)
    estimate = paired(differences)
    effect, margin = interval_text(estimate, "nats"), hypothesis.margin_nats
    if hypothesis.kind == "better":
        needed, least = partial(seeds_for_effect, estimate.value, estimate.deviation), partial(_least, estimate)
        return Finding(effect, estimate.p, estimate.value < 0, None, obstacle, partial(_more, needed, least), note)
    needed = partial(_seeds_about_margin, estimate, margin)
    p, against = equivalence_p(differences, margin), difference_beyond_p(differences, margin)
    return Finding(effect, p, True, against, obstacle, partial(_more, needed, _nothing), note)


def _of_divergences(hypothesis: Hypothesis, curves: list[Curve]) -> Finding:
    """Measure `more_stable`: how many more runs each seed loses in the first arm, over the values that both have."""
    arms = [_arm(name, hypothesis, curves) for name in hypothesis.arms]
    lost = [arm.lost(hypothesis.within_nats) for arm in arms]
    pairs = lost[0].keys() & lost[1].keys()
    seeds = {seed for seed, _ in pairs}
    differences = [sum(lost[0][pair] - lost[1][pair] for pair in pairs if pair[0] == seed) for seed in sorted(seeds)]
    first, second = (sum(each[pair] for pair in pairs) for each in lost)
    effect, is_for = f"{first} of {len(pairs)} runs lost against {second} of {len(pairs)}", first < second
    obstacle = _obstacle(arms, len(seeds))
    if hypothesis.at is None and arms[0].curve.key and are_numbers(arms[0].curve.values):
        stable = [arm.curve.largest_stable(hypothesis.within_nats) for arm in arms]
        texts = [stable_text(arm.curve, value) for arm, value in zip(arms, stable, strict=True)]
        effect += f"; largest stable value {texts[0]} against {texts[1]}"
        is_enough = is_times(stable[0], stable[1], hypothesis.factor)
        if is_for and not is_enough and stable[0] == arms[0].curve.values[-1]:
            obstacle = obstacle or f"{arms[0].curve.name} is stable to the end of its sweep; try larger values"
        is_for = is_for and is_enough
    if len(seeds) < 2:
        return Finding(effect, obstacle=obstacle)
    note = f"Fisher's exact test, which ignores pairs: p = {fisher_p((first, len(pairs)), (second, len(pairs))):.2g}."
    return Finding(effect, sign_flip_p(differences), is_for, None, obstacle, _more_signs, note)


def _of_budgets(hypothesis: Hypothesis, curves: list[Curve]) -> Finding:
    """Measure `gap_shrinks`: the slope of each seed's gap against log2 tokens.

    The gap is the second arm's loss less the first's. Branches of a seed share a trunk, so that only slopes of
    different seeds are independent.
    """
    budgets = sorted({curve.planned_tokens for curve in curves if curve.name in hypothesis.arms})
    arms, gaps = [], []
    for tokens in budgets:
        first, second = (_arm(name, replace(hypothesis, tokens=tokens), curves) for name in hypothesis.arms)
        arms += [first, second]
        gaps.append(_gaps(second.losses, first.losses))
    seeds = set.intersection(*(set(each) for each in gaps))
    obstacle, note = _obstacle(arms, len(seeds)), _note(arms)
    if len(budgets) < 2 or not seeds:
        return Finding("-", obstacle="one budget has no slope" if len(budgets) < 2 else obstacle, note=note)
    doublings = np.log2(budgets)
    slopes = [float(np.polyfit(doublings, [each[seed] for each in gaps], 1)[0]) for seed in sorted(seeds)]
    means = [mean(each[seed] for seed in seeds) for each in gaps]
    ends = f"gap {means[0]:+.4f} nats at {budgets[0] / 1e6:.3g}M tokens, {means[-1]:+.4f} at {budgets[-1] / 1e6:.3g}M; "
    if len(slopes) < 2 or not all(map(math.isfinite, slopes)):
        return Finding(f"{ends}{slopes[0]:+.4f} nats a doubling", obstacle=obstacle, note=note)
    estimate = paired(slopes)
    needed = partial(seeds_for_effect, estimate.value, estimate.deviation)
    effect = ends + interval_text(estimate, "nats a doubling")
    more = partial(_more, needed, partial(_least, estimate))
    return Finding(effect, estimate.p, estimate.value * means[0] < 0, None, obstacle, more, note)


_FINDERS: dict[str, Callable[[Hypothesis, list[Curve]], Finding]] = {
    "equivalent": _of_losses,
    "better": _of_losses,
    "more_stable": _of_divergences,
    "gap_shrinks": _of_budgets,
}


@dataclass(frozen=True)
class _Arm:
    """The runs of one arm that a hypothesis speaks of."""

    curve: Curve
    at: Tree | str | None

    @cached_property
    def records(self) -> list[Record]:
        if not isinstance(self.at, dict):
            return list(self.curve.records)
        return [record for record in self.curve.records if is_at(record.stage.config.as_dict(), self.at)]

    @cached_property
    def trials(self) -> list[Trial]:
        """The finished runs; at its own best value, those there alone."""
        if self.at == OWN_BEST:
            return self.curve.at(self.curve.best.value) if self.curve.best else []
        mine = {id(record) for record in self.records}
        return [trial for trial in self.curve.trials if id(trial.record) in mine]

    @property
    def losses(self) -> dict[int, float]:
        """Each seed's loss: on the half that did not choose the value, where one was chosen."""
        chosen = self.at == OWN_BEST
        return {trial.seed: trial.second if chosen else trial.whole for trial in self.trials}

    def lost(self, within_nats: float | None) -> dict[tuple[int, Any], bool]:
        """Return for each (seed, value) whether the run is lost."""
        limit = self.curve.limit(within_nats)
        return {(trial.seed, trial.value): trial.is_lost or trial.whole > limit for trial in self.trials}

    @property
    def obstacle(self) -> str:
        """Why nothing can be claimed of this arm; '' if something can."""
        unfinished = sum(not record.state.is_final for record in self.records)
        if unfinished:
            return f"{unfinished} of {len(self.records)} runs of {self.curve.name} are unfinished"
        if self.at == OWN_BEST and self.curve.best and self.curve.best.at_edge:
            return (
                f"the best value of {self.curve.name}, {value_text(self.curve.best.value)}, is at the edge of its sweep"
            )
        return ""


def _arm(name: str, hypothesis: Hypothesis, curves: list[Curve]) -> _Arm:
    mine = [curve for curve in curves if curve.name == name]
    tokens = hypothesis.tokens or max(curve.planned_tokens for curve in mine)
    nearest = min(mine, key=lambda curve: abs(curve.planned_tokens - tokens))  # budgets are rounded to whole steps
    return _Arm(nearest, hypothesis.at)


def _gaps(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    """Return first less second for each seed that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def _obstacle(arms: Sequence[_Arm], seeds: int) -> str:
    found = list(dict.fromkeys(arm.obstacle for arm in arms if arm.obstacle))
    if found:
        return "; ".join(found)
    if seeds < 2:
        return "one seed: no interval and no verdict" if seeds else "the arms have no seed in common"
    return ""


def _note(arms: Sequence[_Arm]) -> str:
    lost = {arm.curve.name: sum(trial.is_lost for trial in arm.trials) for arm in arms}
    notes = [f"{count} lost runs of {name} count as ln V." for name, count in lost.items() if count]
    if any(arm.at == OWN_BEST and not arm.curve.has_halves for arm in arms):
        notes.append("Halves were not measured: values were chosen on the text that is reported.")
    return " ".join(notes)


def _more(needed: Callable[[float], int | None], least: Callable[[float], str], alpha: float) -> str:
    seeds = needed(alpha)
    more = f"{seeds} seeds in all decide with a chance of {POWER:.0%}" if seeds else "no number of seeds decides"
    return f"if effect and deviation stay as they are, {more}{least(alpha)}"


def _least(estimate: Estimate, alpha: float) -> str:
    seen = smallest_effect(estimate.n, estimate.deviation, alpha)
    return f"; {estimate.n} seeds find an effect of {seen:.4f} with that chance"


def _nothing(alpha: float) -> str:
    return ""


def _seeds_about_margin(estimate: Estimate, margin: float, alpha: float) -> int | None:
    """Return how many seeds show that a difference lies within a margin, or beyond it, whichever is seen."""
    beyond = abs(estimate.value) - margin
    if beyond < 0:
        return seeds_for_equivalence(estimate.value, margin, estimate.deviation, alpha)
    return seeds_for_effect(beyond, estimate.deviation, 2 * alpha)


def _more_signs(alpha: float) -> str:
    return f"at least {1 - math.floor(math.log2(alpha))} seeds are needed, and all must agree"


def interval_text(estimate: Estimate, unit: str) -> str:
    """Format an estimate as '+0.0123 nats (+0.0039 to +0.0207)'."""
    return f"{estimate.value:+.4f} {unit} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def stable_text(curve: Curve, value: Any) -> str:
    """Format the largest stable value of a curve; '≥' if nothing larger was tried, '-' if values are no numbers."""
    if value is None:
        return "none" if are_numbers(curve.values) else "-"
    return f"{'≥ ' if value == curve.values[-1] else ''}{value_text(value)}"


def is_times(first: Any, second: Any, factor: float) -> bool:
    """Return whether the first of two largest stable values is so many times the second; None is below any."""
    if first is None:
        return False
    return second is None or first >= factor * second * (1 - 1e-9)
