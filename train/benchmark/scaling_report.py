"""Formats what train.benchmark scaling has measured: a line, a table, a picture."""

from pathlib import Path
from typing import Any

from train.benchmark import report as benchmark_report


def row_line(row: dict[str, Any]) -> str:
    """Return one line about a row, for the terminal."""
    name = f"{row['program']} {row['form']}"
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    return (
        f"{name}: {1e3 * row['step_time_s']:.1f} ms a step, {row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, "
        f"{of_one(row)} of one, loss {row['losses'][0]:.4f}, start {row['start_s']:.1f} s"
    )


def of_one(row: dict[str, Any]) -> str:
    """Return a row's share of one GPU, or a question mark if that was not measured."""
    return "?" if row["efficiency"] is None else f"{row['efficiency']:.1%}"


def as_table(report: dict[str, Any]) -> str:
    """Format the rows as Markdown. `of one` compares with the same program on one GPU."""
    model, machine = report["config"]["model"], report.get("machine")
    about = "" if machine is None else f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit "
    about += "" if machine is None else f"{machine['commit']}; "
    lines = [
        f"{about}{model['num_layers']} layers of width {model['hidden_size']}, T = {model['seq_length']}, vocabulary "
        f"{report['vocab_size']:,}; {'strong' if report['strong'] else 'weak'} scaling; medians",
        "",
        "| program | layout | GPUs | batch (micro) | ms a step | tokens/s/GPU | of one | MFU | GiB | network ms | "
        "exposed ms | idle ms | start s | compile s | first loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        cells = [
            row["program"],
            row["form"],
            str(row["ranks"]),
            f"{row['global_batch_size']} ({row['micro_batch_size']})",
        ]
        if "failed" in row:
            lines.append(f"| {' | '.join(cells)} | failed: {row['failed']} |" + " |" * 10)
            continue
        overlap = row["overlap"] or {}
        cells += [
            f"{1e3 * row['step_time_s']:.1f}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            of_one(row),
            f"{row['mfu']:.1%}" if row["mfu"] else "",
            f"{row['peak_memory_gib']:.1f}" if row["peak_memory_gib"] else "",
            *(f"{overlap[key]:.1f}" if key in overlap else "" for key in ("communication_ms", "exposed_ms", "idle_ms")),
            f"{row['start_s']:.1f}",
            f"{row['start_by_phase_s'].get('compile', 0.0):.1f}",
            f"{row['losses'][0]:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw tokens per second on each GPU as bars, with their share of one GPU."""
    done = [row for row in rows if "failed" not in row]
    if not done:
        return
    values = [row["tokens_per_second_per_gpu"] / 1e3 for row in done]
    notes = [f"{value:.4g} ({of_one(row)})" for value, row in zip(values, done, strict=True)]
    labels = [f"{row['program']}, {row['form']}" for row in done]
    benchmark_report.draw_bars(labels, values, "thousand tokens a second on each GPU (share of one GPU)", file, notes)
