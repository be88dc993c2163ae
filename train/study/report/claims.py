"""Write what a study claims: its sweeps, and the verdicts on the hypotheses of its suite file."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.pictures.run import as_array
from train.run.entropy_words import ceiling_nats
from train.study.report.document import Document
from train.study.report.table import with_half_width
from train.study.results import Record, student
from train.study.statistics.hypotheses import OWN_BEST, Hypothesis
from train.study.statistics.inference import ALPHA
from train.study.statistics.sweeps import Curve, are_numbers, curves_of, in_order, value_text
from train.study.statistics.verdicts import Verdict, judge, stable_text

if TYPE_CHECKING:
    from train.study.report.sweep_pictures import Point

EARLY_SHARE = 1 / 8
"""Of a run: where layer entropies stand beside the sweeps, unless a step is asked for. Layers collapse early."""


def write_hypotheses(document: Document, hypotheses: Sequence[Hypothesis], found: list[Record]) -> None:
    """Add the verdict on each hypothesis of the suite file; nothing if it states none."""
    if not hypotheses:
        return
    verdicts = judge(hypotheses, found)
    document.heading("Hypotheses")
    document.table(
        ["hypothesis", "effect (95% interval)", "p", "p, Holm", "verdict"],
        [
            [
                f"{verdict.hypothesis.name}: {claim_text(verdict.hypothesis)}",
                verdict.finding.effect,
                p_text(verdict.finding.p),
                p_text(verdict.adjusted),
                verdict.word,
            ]
            for verdict in verdicts
        ],
    )
    document.text(
        f"The claims stand in the suite file. Tests pair runs of one seed, at a level of {ALPHA:.0%} for all "
        f"{len(verdicts)} claims together (Holm). A difference is the first arm's loss less the second's."
    )
    notes = [f"- {each.hypothesis.name}: {text}" for each in verdicts if (text := _note(each))]
    if notes:
        document.text("\n".join(notes))


def _note(verdict: Verdict) -> str:
    parts = [f"{verdict.word}: {verdict.reason}." if verdict.reason else "", verdict.finding.note]
    return " ".join(part for part in parts if part)


def claim_text(hypothesis: Hypothesis) -> str:
    """Return the claim in words, with the settings that choose its runs."""
    first, second = hypothesis.arms
    more = {
        "equivalent": f"{first} and {second} differ by less than {hypothesis.margin_nats:g} nats",
        "better": f"{first} is better than {second}",
        "more_stable": f"{first} loses fewer runs than {second}",
        "gap_shrinks": f"the gap between {first} and {second} shrinks with tokens",
    }[hypothesis.kind]
    if hypothesis.factor != 1:
        more += f", and its largest stable value is at least {hypothesis.factor:g} times as large"
    at = hypothesis.at
    if at == OWN_BEST:
        more += ", each at its own best value"
    elif isinstance(at, dict):
        more += ", at " + ", ".join(f"{key.partition('.')[2]} {value}" for key, value in at.items())
    return f"{hypothesis.claim} ({more})" if hypothesis.claim else more


def p_text(p: float | None) -> str:
    """Format a p value; '-' if there is none."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def write_sweeps(document: Document, found: list[Record], entropy_step: int | None = None) -> None:
    """Add a table and pictures of each key that the suite sweeps; nothing if it sweeps none.

    Args:
        document: the report.
        found: all results of the suite.
        entropy_step: step of the layer entropies; None takes EARLY_SHARE of the run.
    """
    swept = [curve for curve in curves_of(found) if curve.key]
    if not swept:
        return
    document.heading("Sweeps")
    for key in dict.fromkeys(curve.key for curve in swept if curve.key):
        curves = [curve for curve in swept if curve.key == key]
        _table(document, curves, key)
        _values(document, curves)
        _sweep_picture(document, curves, key, entropy_step)
        _cost_picture(document, curves, key)


def _table(document: Document, curves: list[Curve], key: str) -> None:
    name = key.partition(".")[2].replace("_", " ")
    header = ["arm", "tokens (M)", f"best {name}", "loss there, other half", "seeds", "lowest point of the parabola",
              "perplexity a byte", f"largest stable {name}", "lost", "remarks"]  # fmt: skip
    document.table(header, [_row(curve) for curve in curves])
    document.text(
        "The best value has the lowest mean loss over seeds on the first half of the validation split; the loss beside "
        "it is of the second half, with a 95% interval over seeds. The parabola goes through the best value and its "
        "neighbours, in the value's logarithm. Lost: runs that diverged, or ended above ln V, the loss of a uniform "
        "guess; they count as ln V. Largest stable: no run is lost there or below. At the edge: the best value may lie "
        "beyond the sweep, so that no claim is made of the arm."
    )


def _values(document: Document, curves: list[Curve]) -> None:
    """Add the loss of every arm at every value."""
    values = in_order(value for curve in curves for value in curve.values)
    budgets = {curve.planned_tokens for curve in curves}
    names = [f"{curve.name}, {curve.planned_tokens / 1e6:.3g}M" if len(budgets) > 1 else curve.name for curve in curves]
    rows = [[name, *(_loss_at(curve, value) for value in values)] for name, curve in zip(names, curves, strict=True)]
    document.table(["loss, other half, at", *map(value_text, values)], rows)


def _loss_at(curve: Curve, value: Any) -> str:
    trials = curve.at(value)
    spread, lost = student([trial.second for trial in trials]), sum(trial.is_lost for trial in trials)
    if spread is None:
        return "-"
    if lost == len(trials):
        return "lost" if lost == 1 else f"all {lost} lost"
    return with_half_width("{:.4f}", spread) + (f", {lost} of {len(trials)} lost" if lost else "")


def _row(curve: Curve) -> list[str]:
    best, remarks = curve.best, []
    if curve.unfinished:
        remarks.append(f"{curve.unfinished} of {len(curve.records)} unfinished")
    if best is not None and best.at_edge:
        remarks.append("at the edge")
    if not curve.has_halves:
        remarks.append("halves not measured: chosen and reported on the same text")
    head = [curve.name, f"{curve.planned_tokens / 1e6:.3g}"]
    lost = f"{curve.lost} of {len(curve.trials)}"
    stable = stable_text(curve, curve.largest_stable())
    if best is None:
        return [*head, "-", "-", "-", "-", "-", stable, lost, "; ".join(remarks)]
    fitted = f"{best.fitted[1]:.4f} at {best.fitted[0]:.2g}" if best.fitted else "-"
    return [
        *head,
        value_text(best.value),
        with_half_width("{:.4f}", (best.loss, best.half_width)),
        str(best.seeds),
        fitted,
        _perplexity_a_byte(curve, best.loss),
        stable,
        lost,
        "; ".join(remarks),
    ]


def _perplexity_a_byte(curve: Curve, loss: float) -> str:
    sizes = {trial.record.outcome.bytes_per_token for trial in curve.trials}
    size = sizes.pop() if len(sizes) == 1 else None
    return f"{math.exp(loss / size):.4f}" if size else "-"


def _sweep_picture(document: Document, curves: list[Curve], key: str, entropy_step: int | None) -> None:
    from train.study.report.sweep_pictures import Line, sweep_figure

    largest = max(curve.planned_tokens for curve in curves)
    lines = []
    for curve in curves:
        points = [_point(curve, value, entropy_step) for value in curve.values]
        drawn = [point for point in points if point.losses or point.lost]
        if curve.planned_tokens == largest and drawn:
            lines.append(Line(curve.name, drawn, ceiling_nats(curve.records[0].model.seq_length)))
    values = [point.value for line in lines for point in line.points]
    if lines and are_numbers(values) and min(values) > 0:
        halves = "the second half of" if all(curve.has_halves for curve in curves) else "all of"
        caption = (
            f"Loss on {halves} the validation split, and below it the mean entropy of each layer early in training"
        )
        document.picture(f"sweep_{key.partition('.')[2]}", sweep_figure(lines, key), caption)


def _point(curve: Curve, value: Any, entropy_step: int | None) -> "Point":
    from train.study.report.sweep_pictures import Point

    trials = curve.at(value)
    losses = tuple(trial.second for trial in trials if not trial.is_lost)
    lost = sum(trial.is_lost for trial in trials)
    layers = next((found for trial in trials if (found := trial.record.outcome.layers)), None)
    if layers is None:
        return Point(value, losses, lost)
    wanted = entropy_step or EARLY_SHARE * trials[0].record.stage.config.train_steps
    place = int(np.argmin(np.abs(np.array(layers["step"]) - wanted)))
    return Point(value, losses, lost, as_array(layers["entropy_nats"][place]), layers["step"][place])


def _cost_picture(document: Document, curves: list[Curve], key: str) -> None:
    from train.study.report.sweep_pictures import CostPoint, cost_figure

    points = []
    for curve in curves:
        best, cost = curve.best, curve.records[0].cost
        if best is not None and cost is not None:
            points.append(CostPoint(curve.name, cost.communication_gb, best.loss, best.half_width, best.at_edge))
    if points:
        caption = "Loss at each arm's own best value against communication, as the cost model predicts it"
        document.picture(f"cost_{key.partition('.')[2]}", cost_figure(points), caption)
