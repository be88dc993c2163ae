"""Write the report of a suite: its results beside the paper's, and its pictures."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from train.pictures.run import Array, FigureError, Run, as_array, load_run
from train.run.reader import RunError, read_object
from train.study.document import Document
from train.study.results import Group, Record, description, grouped, records
from train.study.runner import ENVIRONMENT
from train.study.state import nan_heads
from train.study.suite import Suite
from train.study.table import at_published_size, title_of, write_table

DRAWN = ("step", "tokens", "ce_loss", "grad_norm", "tokens_per_second")
MOST_PANELS = 12  # pictures stay readable; the report says what it leaves out


def write_report(suite: Suite, folder: Path, note: str = "") -> list[Path]:
    """Write the report of the results so far.

    Args:
        suite: the study.
        folder: of the report.
        note: a sentence for the top of the report.

    Returns:
        The paths of report.md and report.html.
    """
    found = records(suite)
    groups = grouped(found)
    document = Document(folder, f"Study {suite.name}")
    document.text("\n".join(_provenance(suite, found, groups) + ([note] if note else [])))
    document.heading("Perplexity, operations, cost of private inference")
    write_table(document, groups)
    _divergences(document, found)
    _pictures(document, groups)
    return document.write()


def _provenance(suite: Suite, found: list[Record], groups: list[Group]) -> list[str]:
    words = [record.state.word for record in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    tokens = sum(record.tokens for record in found)
    lines = [f"{len(found)} results ({counts}); {tokens / 1e6:,.1f} million tokens seen by them in all."]
    with contextlib.suppress(RunError, LookupError):  # if it is missing or damaged, the report goes without
        machine = read_object(suite.output / ENVIRONMENT) or {}
        lines.append(f"Trained on {machine['device']}, torch {machine['torch']}, {machine['date']}.")
    begun = [description(record.folder) for record in found if record.state.word != "other"]
    commits = {str(commit) for described in begun if (commit := described.get("git_commit"))}
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
    from train.study import pictures

    drawn = [(group, run) for group in groups if (run := _loaded(group.first)) is not None]
    _stability(document, _last_budget(drawn))
    curves = {title_of(group): curve for group, run in drawn if (curve := run.validation_curve("tokens")) is not None}
    if curves:
        document.heading("Validation loss")
        document.picture(
            "validation_loss", plots.validation_figure(curves), "Validation loss against tokens, first seed"
        )
    _pareto(document, groups)
    shown = [(group, run) for group, run in _last_budget(drawn) if run.head_rows][:MOST_PANELS]
    if not shown:
        return
    document.heading("Entropy of the heads")
    newest = {f"{title_of(group)}, step {run.head_rows[-1]['step']}": _last_heads(run) for group, run in shown}
    lengths = [run.seq_length for _, run in shown]
    left_out = len(_last_budget(drawn)) - len(shown)
    more = f" ({left_out} more not drawn)" if left_out else ""
    document.picture("head_maps", maps.head_maps_figure(newest, lengths), f"Mean entropy of every head{more}")
    layers = {title_of(group): run.head_history() for group, run in shown}
    document.picture(
        "layer_entropies", pictures.layer_entropies_figure(layers, lengths), "Layer-wise mean entropy against step"
    )
    shares = {title_of(group): _last_heads(run) for group, run in shown}
    document.picture(
        "head_shares", pictures.shares_figure(shares, lengths), "Heads that are collapsed, healthy and overloaded"
    )
    _thresholds(document, shown)
    nans = {title_of(group): nan_heads(run.head_rows[-1]["entropy_nats"]) for group, run in shown}
    if any(any(counts) for counts in nans.values()):
        lost = {name: counts for name, counts in nans.items() if any(counts)}
        document.picture("nan_counts", pictures.nan_counts_figure(lost), "NaN heads of each layer when the run stopped")


def _stability(document: Document, drawn: list[tuple[Group, Run]]) -> None:
    """Add a table and a picture of how smoothly each run trained."""
    from train.study import pictures

    trained = [(title_of(group), run.training_rows) for group, run in drawn if run.training_rows]
    if not trained:
        return
    document.heading("Training")
    rows, curves = [], {}
    for name, lines in trained:
        steps, losses, norms = (as_array([row[key] for row in lines]) for key in ("step", "ce_loss", "grad_norm"))
        rise, place = pictures.largest_rise(losses)
        finite = losses[np.isfinite(losses)]
        last = f"{finite[-10:].mean():.3f}" if len(finite) else "-"
        norm = f"{norms[np.isfinite(norms)].max():.3g}" if np.isfinite(norms).any() else "-"
        lost = int((~np.isfinite(norms)).sum())
        speed = float(np.median([row["tokens_per_second"] for row in lines]))
        rows.append(
            [name, f"{steps[-1]:.0f}", last, f"{rise:.2f} at {steps[place]:.0f}", norm, str(lost), f"{speed:,.0f}"]
        )
        curves[name] = (steps, losses, norms)
    header = ["run", "steps", "mean loss of the last 10", "largest rise over the running mean (nats), at step",
              "largest gradient norm", "steps whose gradient is not finite", "tokens/s (median)"]  # fmt: skip
    document.table(header, rows)
    document.text(
        "One seed of each model. A step whose gradient is not finite changes nothing, so a run of many such steps "
        "stands still. tokens/s are of one run, which may have shared the device with others."
    )
    shown = dict(list(curves.items())[:MOST_PANELS])
    document.picture("training", pictures.training_figure(shown), "Training loss and gradient norm of single steps")


def _thresholds(document: Document, shown: list[tuple[Group, Run]]) -> None:
    """Add the threshold map of the first regularized run."""
    from train.pictures import maps

    for group, run in shown:
        threshold = run.head_rows[-1].get("threshold")
        if threshold is not None:
            values = as_array(threshold)
            found = f"mean {np.nanmean(values):.3f}, from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}"
            caption = f"Learned thresholds of {title_of(group)}: {found} (the paper: mean 0.366, from 0.20 to 0.52)"
            document.picture("thresholds", maps.threshold_map_figure(values, title_of(group)), caption)
            return


def _pareto(document: Document, groups: list[Group]) -> None:
    from train.study.pictures import ParetoPoint, pareto_figure

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


def _last_budget(drawn: list[tuple[Group, Run]]) -> list[tuple[Group, Run]]:
    """Keep only each run's largest budget."""
    longest: dict[str, tuple[Group, Run]] = {}
    for group, run in drawn:
        kept = longest.get(group.label)
        if kept is None or group.first.planned_tokens > kept[0].first.planned_tokens:
            longest[group.label] = (group, run)
    return list(longest.values())


def _loaded(record: Record) -> Run | None:
    if record.state.word == "other":
        return None
    try:
        run = load_run(record.folder)
        as_array([[row[key] for key in DRAWN] for row in run.training_rows])
        as_array([row["validation_loss"] for row in run.validation_rows])
    except (FigureError, KeyError):
        return None
    return run


def _last_heads(run: Run) -> Array:
    """Return the last row's entropies; those of a diverged run are NaN, and the picture says so."""
    return as_array(run.head_rows[-1]["entropy_nats"])


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
