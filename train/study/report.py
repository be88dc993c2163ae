"""The report of a suite: its table beside the paper's numbers, and its pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.accounting import NonlinearOperation, forward_flops, nonlinear_operations, printed_gflops
from train.figures import FigureError, Run, as_array, load_run, validation_curve
from train.study.document import Document
from train.study.results import Group, Record, grouped, records
from train.study.runner import nan_heads
from train.study.suite import Suite

MOST_PANELS = 12  # pictures stay readable; the report says what it leaves out
SYMBOLS = {"softmax": "SM", "layernorm": "LN", "gelu": "G", "relu": "R"}


def write_report(suite: Suite, folder: Path, note: str = "") -> list[Path]:
    """Writes the report of whatever has been reached so far; returns its files."""
    found = records(suite)
    groups = grouped(found)
    document = Document(folder, f"Study {suite.name}")
    document.text("\n".join(_provenance(suite, found) + ([note] if note else [])))
    document.heading("Perplexity, operations, cost of private inference")
    _main_table(document, groups)
    _divergences(document, found)
    _pictures(document, groups)
    return document.write()


def _provenance(suite: Suite, found: list[Record]) -> list[str]:
    words = [record.state.word for record in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    tokens = sum(record.tokens for record in found)
    lines = [f"{len(found)} results ({counts}); {tokens / 1e6:,.1f} million tokens seen by them in all."]
    file = suite.output / "environment.json"
    if file.exists():
        machine = json.loads(file.read_text(encoding="utf-8"))
        lines.append(f"Trained on {machine['device']}, torch {machine['torch']}, {machine['date']}.")
    commits = {str(commit) for record in found if (commit := _description(record).get("git_commit"))}
    if commits:
        lines.append(f"Commit {', '.join(sorted(commits))}.")
    lines.append(
        "Perplexity is over the whole validation split of each run's own dataset; published figures are from other "
        "data and other lengths unless the run's length says otherwise, so read the gaps to SM+LN+G first."
    )
    return lines


def _description(record: Record) -> dict[str, Any]:
    file = record.folder / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _main_table(document: Document, groups: list[Group]) -> None:
    header = ["model", "tokens (M)", "seeds", "perplexity", "± 95%", "vs SM+LN+G", "published", "vs SM+LN+G there",
              "vs published", "NaN", "FFN", "attention", "nonlinear operations", "GB", "min"]  # fmt: skip
    document.table(header, [_row(group, groups) for group in groups])
    document.text(
        "FFN and attention: FLOPs of a forward pass over one sequence, as arXiv 2501.03489 counts them. GB and min: "
        "predicted by `python -m train.private_inference`. ± 95%: Student's interval over seeds. NaN: seeds diverged."
    )


def _row(group: Group, groups: list[Group]) -> list[str]:
    record = group.first
    spread = group.mean_and_half_width()
    value = spread[0] if spread else None
    published = record.row.perplexity if record.row else None
    baseline = _baseline(group, groups)
    base_value = baseline.mean_and_half_width() if baseline else None
    base_published = baseline.first.row.perplexity if baseline and baseline.first.row else None
    ffn, attention = flops_text(record)
    cost = record.cost
    return [
        group.label + (f" ({group.unfinished} unfinished)" if group.unfinished else ""),
        f"{record.planned_tokens / 1e6:,.1f}",
        str(len(group.records)),
        f"{value:.3f}" if value is not None else "NaN" if group.diverged else "-",
        f"{spread[1]:.3f}" if spread and spread[1] is not None else "-",
        relative(value, base_value[0] if base_value else None),
        "NaN" if record.row and record.row.diverges else f"{published:g}" if published else "-",
        relative(published, base_published),
        relative(value, published),
        f"{group.diverged} of {len(group.records)}" if group.diverged else "0",
        ffn,
        attention,
        operations_text(nonlinear_operations(record.model)),
        f"{cost.communication_gb:.2f}",
        f"{cost.latency_min:.2f}",
    ]


def flops_text(record: Record) -> tuple[str, str]:
    """FLOPs of (FFN, attention) as the paper prints them, in units of 1e6 for models too small for that."""
    flops = forward_flops(record.model)
    if min(flops.ffn, flops.attention) >= 1e9:
        ffn, attention = printed_gflops(record.model)
        return f"{ffn}B", f"{attention}B"
    return f"{flops.ffn / 1e6:.3g}M", f"{flops.attention / 1e6:.3g}M"


def _baseline(group: Group, groups: list[Group]) -> Group | None:
    """The LayerNorm and GELU model of the same size and length."""
    mine = group.first
    for other in groups:
        theirs = other.first
        same_size = (theirs.model.num_layers, theirs.model.hidden_size, theirs.model.seq_length) == (
            mine.model.num_layers,
            mine.model.hidden_size,
            mine.model.seq_length,
        )
        if theirs.model.architecture == "SM+LN+G" and same_size and theirs.planned_tokens == mine.planned_tokens:
            return other
    return None


def relative(value: float | None, reference: float | None) -> str:
    """'+3.1%', or a dash where either is unknown."""
    return "-" if value is None or not reference else f"{value / reference - 1:+.1%}"


def operations_text(operations: dict[str, NonlinearOperation]) -> str:
    """As the paper's tables write them: 'SM:144x128x128 LN:24x128x768'."""
    return " ".join(
        f"{SYMBOLS[kind]}:{operation.count}x{operation.rows}x{operation.columns}"
        for kind, operation in operations.items()
        if kind in SYMBOLS
    )


def _divergences(document: Document, found: list[Record]) -> None:
    lost = [record for record in found if record.state.word in ("diverged", "failed")]
    if not lost:
        return
    document.heading("Runs that did not finish")
    document.table(
        ["run", "outcome", "what is known"],
        [[f"{record.label}, seed {record.seed}", record.state.word, record.state.detail] for record in lost],
    )


def _pictures(document: Document, groups: list[Group]) -> None:
    from train import map_plots, plots
    from train.study import pictures

    drawn = [(group, run) for group in groups if (run := _loaded(group.first)) is not None]
    _stability(document, _last_budget(drawn))
    curves = {_title(group): curve for group, run in drawn if (curve := validation_curve(run, "tokens")) is not None}
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
    maps = {f"{_title(group)}, step {run.head_rows[-1]['step']}": _last_heads(run) for group, run in shown}
    lengths = [run.seq_length for _, run in shown]
    left_out = len(_last_budget(drawn)) - len(shown)
    more = f" ({left_out} more not drawn)" if left_out else ""
    document.picture("head_maps", map_plots.head_maps_figure(maps, lengths), f"Mean entropy of every head{more}")
    layers = {
        _title(group): (
            as_array([row["step"] for row in run.head_rows]),
            as_array([row["entropy_nats"] for row in run.head_rows]),
        )
        for group, run in shown
    }
    document.picture(
        "layer_entropies", pictures.layer_entropies_figure(layers, lengths), "Layer-wise mean entropy against step"
    )
    shares = {_title(group): _last_heads(run) for group, run in shown}
    document.picture("head_shares", pictures.shares_figure(shares), "Share of heads by quarters of the largest entropy")
    _thresholds(document, shown)
    nans = {_title(group): nan_heads(run.head_rows[-1]["entropy_nats"]) for group, run in shown}
    if any(any(counts) for counts in nans.values()):
        lost = {name: counts for name, counts in nans.items() if any(counts)}
        document.picture("nan_counts", pictures.nan_counts_figure(lost), "NaN heads of each layer when the run stopped")


def _stability(document: Document, drawn: list[tuple[Group, Run]]) -> None:
    """How smoothly each run trained."""
    from train.study import pictures

    trained = [(_title(group), run.training_rows) for group, run in drawn if run.training_rows]
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
        "A step whose gradient is not finite changes nothing: a run of many such steps stands still. tokens/s are of "
        "one run, which may have shared the device with others."
    )
    shown = dict(list(curves.items())[:MOST_PANELS])
    document.picture("training", pictures.training_figure(shown), "Training loss and gradient norm of single steps")


def _thresholds(document: Document, shown: list[tuple[Group, Run]]) -> None:
    """The map of the first regularized run."""
    from train import map_plots

    for group, run in shown:
        threshold = run.head_rows[-1].get("threshold")
        if threshold is not None:
            values = as_array(threshold)
            found = f"mean {np.nanmean(values):.3f}, from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}"
            caption = f"Learned thresholds of {_title(group)}: {found} (the paper: mean 0.366, from 0.20 to 0.52)"
            document.picture("thresholds", map_plots.threshold_map_figure(values, _title(group)), caption)
            return


def _pareto(document: Document, groups: list[Group]) -> None:
    from train.study.pictures import ParetoPoint, pareto_figure

    points = []
    for group in groups:
        record, spread = group.first, group.mean_and_half_width()
        gigabytes = record.cost.communication_gb
        if spread is not None:
            points.append(ParetoPoint(_title(group), gigabytes, spread[0]))
        if record.row is not None and record.row.perplexity is not None and _at_published_size(record):
            points.append(ParetoPoint(_title(group), gigabytes, record.row.perplexity, published=True))
    if any(not point.published for point in points):
        document.heading("Perplexity against communication")
        document.picture("pareto", pareto_figure(points), "Validation perplexity against predicted communication")


def _at_published_size(record: Record) -> bool:
    return record.row is not None and record.row.config().model == record.model


def _title(group: Group) -> str:
    """Short: the row's label in the paper, with the budget where several share it."""
    record = group.first
    name = record.row.label if record.row else record.label
    return f"{name}, {record.planned_tokens / 1e6:.3g}M" if record.folder.name.startswith("tokens") else name


def _last_budget(drawn: list[tuple[Group, Run]]) -> list[tuple[Group, Run]]:
    """Of runs with several budgets, the longest alone."""
    longest: dict[str, tuple[Group, Run]] = {}
    for group, run in drawn:
        kept = longest.get(group.label)
        if kept is None or group.first.planned_tokens > kept[0].first.planned_tokens:
            longest[group.label] = (group, run)
    return list(longest.values())


def _loaded(record: Record) -> Run | None:
    try:
        return load_run(record.folder)
    except FigureError:
        return None


def _last_heads(run: Run) -> Any:
    """The last row's entropies; those of a diverged run are NaN, and the picture says so."""
    return as_array(run.head_rows[-1]["entropy_nats"])


def results_rows(found: list[Record]) -> list[dict[str, Any]]:
    """One flat object a result, for programs."""
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
            "communication_gb": record.cost.communication_gb,
            "latency_min": record.cost.latency_min,
            "folder": str(record.folder),
        }
        for record in found
    ]
