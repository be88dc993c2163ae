"""Formats the results of the layout test as a table and as JSON."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from data.files.strict_json import to_json
from train.benchmark.report import machine
from train.layout_test.cases import ARITHMETICS, Case
from train.layout_test.launch import Job
from train.layout_test.results import Trained, judge


def row(
    case: Case, job: Job, trained: Trained | None, references: dict[tuple[str, str], Trained | None]
) -> dict[str, Any]:
    """Judge one layout and return its row."""
    named = {
        "family": case.family,
        "layout": str(case.layout),
        "devices": case.layout.world_size,
        "seconds": job.seconds,
    }
    truth, baseline = (references.get((case.reference_family, each)) for each in ARITHMETICS)
    if trained is None:
        return {**named, "passed": False, "verdict": f"FAILED {job.last_words}"}
    if truth is None or baseline is None:
        return {**named, "passed": False, "verdict": "FAILED its reference did not train"}
    verdict = judge(trained, truth, baseline)
    return {**named, "verdict": verdict.words, **dataclasses.asdict(verdict)}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON, if a file was named or this machine has a GPU."""
    file = options.json
    if file is None and torch.cuda.is_available():
        card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
        file = f"docs/benchmarks/layouts_{card}_x{options.devices}.json"
    if file is not None:
        about = {
            **machine(),
            "command": "python -m train.layout_test " + " ".join(sys.argv[1:]),
            "steps": options.steps,
        }
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(to_json({"machine": about, "layouts": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table with one line per layout."""
    width = max(len(f"{row['family']} {row['layout']}") for row in rows)
    titles = "devices  seconds  gradient (limit)     loss, nats (limit)   norm    worst parameter"
    lines = [f"{'layout':<{width}}  {titles}"]
    for each in rows:
        name = f"{each['family']} {each['layout']}"
        start = f"{name:<{width}}  {each['devices']:7d}  {each['seconds']:7.0f}"
        if "gradient_error" not in each:
            lines.append(f"{start}  {each['verdict']}")
            continue
        lines.append(
            f"{start}  {each['gradient_error']:.1e} ({each['gradient_limit']:.1e})    "
            f"{each['loss_error_nats']:.1e} ({each['loss_limit_nats']:.1e})    {each['gradient_norm']:.4f}  "
            f"{each['worst_parameter']}  {'' if each['passed'] else each['verdict']}".rstrip()
        )
    return "\n".join(lines)
