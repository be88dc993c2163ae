"""Write the report of a suite: its results beside the paper's, its claims, and its pictures."""

from pathlib import Path

import numpy as np

from train.pictures.run import Array, as_array
from train.study.outcome import Outcome, Tree
from train.study.report.claims import write_hypotheses, write_sweeps
from train.study.report.document import Document
from train.study.report.table import at_published_size, title_of, write_table
from train.study.results import Group, Record, grouped, records
from train.study.state import nan_heads
from train.study.statistics.hypotheses import curve_of
from train.study.statistics.sweeps import curves_of
from train.study.suite import Suite

MOST_PANELS = 12  # pictures stay readable; the report says what it leaves out


def write_report(suite: Suite, folder: Path, note: str = "", entropy_step: int | None = None) -> list[Path]:
    """Write the report of the results so far.

    Args:
        suite: the study.
        folder: of the report.
        note: a sentence for the top of the report.
        entropy_step: step whose layer entropies stand beside the sweeps; None takes an eighth of the run.

    Returns:
        The paths of report.md and report.html.
    """
    found = records(suite)
    groups = grouped(found)
    document = Document(folder, f"Study {suite.name}")
    document.text("\n".join(_provenance(found, groups) + ([note] if note else [])))
    write_hypotheses(document, suite.hypotheses, found)
    write_sweeps(document, found, entropy_step)
    document.heading("Perplexity, operations, cost of private inference")
    shown = _best_of_sweeps(groups, found)
    write_table(document, shown)
    if len(shown) < len(groups):
        document.text("Of each sweep, the table and the pictures below show the best value alone.")
    _divergences(document, found)
    _pictures(document, shown)
    return document.write()


def _provenance(found: list[Record], groups: list[Group]) -> list[str]:
    words = [record.state.word for record in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    tokens = sum(record.tokens for record in found)
    lines = [f"{len(found)} results ({counts}); {tokens / 1e6:,.1f} million tokens seen by them in all."]
    begun = [record.outcome for record in found if record.state.word not in ("other", "new")]
    machines = [", ".join(text) for outcome in begun if (text := _machine_words(outcome.machine))]
    if machines:
        lines.append(f"Trained on {'; '.join(dict.fromkeys(machines))}.")
    commits = dict.fromkeys(outcome.commit for outcome in begun if outcome.commit)
    if commits:
        lines.append(f"Commit {', '.join(sorted(commits))}.")
    shapes = {(model.num_layers, model.hidden_size, model.num_attention_heads, model.seq_length)
              for model in (record.model for record in found)}  # fmt: skip
    if len(shapes) == 1:
        layers, width, heads, length = shapes.pop()
        lines.append(f"All models: {layers} layers of width {width}, {heads} heads, T = {length}.")
    lines.append(
        "Perplexity is over the whole validation split of each run's own dataset. Published figures come from other "
        "data, and mostly from larger models and longer runs. So compare gaps, not values."
    )
    if any(group.unfinished for group in groups):
        lines.append("Some runs are unfinished: their rows use the seeds that are done.")
    return lines


def _best_of_sweeps(groups: list[Group], found: list[Record]) -> list[Group]:
    """Leave out, of each sweep, all values but the best: forty curves are no picture."""
    best = {(curve.name, curve.planned_tokens): curve.best for curve in curves_of(found)}
    kept = []
    for group in groups:
        name, _, value = curve_of(group.first.arm, group.first.swept)
        chosen = best[name, group.first.planned_tokens]
        if chosen is None or chosen.value == value:
            kept.append(group)
    return kept


def _machine_words(machine: Tree) -> list[str]:
    if "device" not in machine:
        return []
    version = [f"torch {machine['torch']}"] if "torch" in machine else []
    return [machine["device"], *version, *([machine["date"]] if "date" in machine else [])]


def _divergences(document: Document, found: list[Record]) -> None:
    lost = [record for record in found if record.state.word in ("diverged", "failed", "other")]
    if not lost:
        return
    document.heading("Runs that did not finish")
    document.table(
        ["run", "outcome", "what is known"],
        [[f"{record.label}, seed {record.seed}", record.state.word, record.state.detail] for record in lost],
    )


def _pictures(document: Document, groups: list[Group]) -> None:
    from train.pictures import maps, plots
    from train.study.report import pictures

    drawn = [(group, group.first.outcome) for group in groups]
    _stability(document, _last_budget(drawn))
    curves = {
        title_of(group): (as_array(outcome.validation["tokens"]), as_array(outcome.validation["loss"]))
        for group, outcome in drawn
        if outcome.validation
    }
    if curves:
        document.heading("Validation loss")
        document.picture(
            "validation_loss", plots.validation_figure(curves), "Validation loss against tokens, first seed"
        )
    _pareto(document, groups)
    with_heads = [(group, outcome) for group, outcome in _last_budget(drawn) if outcome.heads]
    shown = with_heads[:MOST_PANELS]
    if not shown:
        return
    document.heading("Entropy of the heads")
    heads = {title_of(group): outcome.heads or {} for group, outcome in shown}
    lengths = [group.first.model.seq_length for group, _ in shown]
    newest = {f"{title}, step {last['step']}": _last_heads(last) for title, last in heads.items()}
    left_out = len(with_heads) - len(shown)
    more = f" ({left_out} more not drawn)" if left_out else ""
    document.picture("head_maps", maps.head_maps_figure(newest, lengths), f"Mean entropy of every head{more}")
    layers = {
        title_of(group): (as_array(outcome.layers["step"]), as_array(outcome.layers["entropy_nats"]))
        for group, outcome in shown
        if outcome.layers
    }
    document.picture(
        "layer_entropies", pictures.layer_entropies_figure(layers, lengths), "Layer-wise mean entropy against step"
    )
    shares = {title: _last_heads(last) for title, last in heads.items()}
    document.picture(
        "head_shares", pictures.shares_figure(shares, lengths), "Heads that are collapsed, healthy and overloaded"
    )
    _thresholds(document, shown)
    nans = {title: nan_heads(last["entropy_nats"]) for title, last in heads.items()}
    if any(any(counts) for counts in nans.values()):
        lost = {name: counts for name, counts in nans.items() if any(counts)}
        document.picture("nan_counts", pictures.nan_counts_figure(lost), "NaN heads of each layer when the run stopped")


def _stability(document: Document, drawn: list[tuple[Group, Outcome]]) -> None:
    """Add a table and a picture of how smoothly each run trained."""
    from train.study.report import pictures

    rows, curves = [], {}
    for group, outcome in drawn:
        training, curve = outcome.training, outcome.curve
        if training is None or curve is None:
            continue
        last, norm, speed = (training[key] for key in ("last_loss", "largest_norm", "tokens_per_second"))
        rows.append(
            [
                title_of(group),
                f"{training['steps']}",
                "-" if last is None else f"{last:.3f}",
                f"{training['rise_nats']:.2f} at {training['rise_step']}",
                "-" if norm is None else f"{norm:.3g}",
                f"{training['lost_steps']}",
                "-" if speed is None else f"{speed:,.0f}",
            ]
        )
        curves[title_of(group)] = (curve["step"], as_array(curve["loss"]), as_array(curve["grad_norm"]))
    if not rows:
        return
    document.heading("Training")
    header = ["run", "steps", "mean loss of the last 10", "largest rise over the running mean (nats), at step",
              "largest gradient norm", "steps whose gradient is not finite", "tokens/s (median)"]  # fmt: skip
    document.table(header, rows)
    document.text(
        "One seed of each model. A step whose gradient is not finite changes nothing, so a run of many such steps "
        "stands still. tokens/s are of one run, which may have shared the device with others."
    )
    shown = dict(list(curves.items())[:MOST_PANELS])
    caption = "Mean training loss and largest gradient norm of some sixty intervals of each run"
    document.picture("training", pictures.training_figure(shown), caption)


def _thresholds(document: Document, shown: list[tuple[Group, Outcome]]) -> None:
    """Add the threshold map of the first regularized run."""
    from train.pictures import maps

    for group, outcome in shown:
        threshold = (outcome.heads or {}).get("threshold")
        if threshold is not None:
            values = as_array(threshold)
            found = f"mean {np.nanmean(values):.3f}, from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}"
            caption = f"Learned thresholds of {title_of(group)}: {found} (the paper: mean 0.366, from 0.20 to 0.52)"
            document.picture("thresholds", maps.threshold_map_figure(values, title_of(group)), caption)
            return


def _pareto(document: Document, groups: list[Group]) -> None:
    from train.study.report.pictures import ParetoPoint, pareto_figure

    points = []
    for group in groups:
        record, spread = group.first, group.mean_and_half_width()
        if record.cost is None:
            continue
        gigabytes = record.cost.communication_gb
        if spread is not None:
            points.append(ParetoPoint(title_of(group), gigabytes, spread[0]))
        if record.row is not None and record.row.perplexity is not None and at_published_size(record):
            points.append(ParetoPoint(title_of(group), gigabytes, record.row.perplexity, published=True))
    if any(not point.published for point in points):
        document.heading("Perplexity against communication")
        document.picture("pareto", pareto_figure(points), "Validation perplexity against predicted communication")


def _last_budget(drawn: list[tuple[Group, Outcome]]) -> list[tuple[Group, Outcome]]:
    """Keep only each run's largest budget."""
    longest: dict[str, tuple[Group, Outcome]] = {}
    for group, outcome in drawn:
        kept = longest.get(group.label)
        if kept is None or group.first.planned_tokens > kept[0].first.planned_tokens:
            longest[group.label] = (group, outcome)
    return list(longest.values())


def _last_heads(heads: Tree) -> Array:
    """Return the last row's entropies; those of a diverged run are NaN, and the picture says so."""
    return as_array(heads["entropy_nats"])
