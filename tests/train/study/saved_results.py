"""Make files of finished results without training: what each run gave is a formula."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.study.outcome import Outcome
from train.study.reading import compared
from train.study.suite import PlannedRun, Suite, load_suite

VOCABULARY = 400
Given = dict[str, Any]
"""What a formula says of a run: fields of its Outcome; without a loss it diverged."""


def write_suite(folder: Path, **keys: Any) -> Path:
    """Write a suite of tiny models on a dataset that is not there."""
    base = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
        "data": {"path": "nowhere", "planned_vocab_size": VOCABULARY},
        "training": {"train_steps": 12, "micro_batch_size": 4, "global_batch_size": 8},
    }
    file = folder / "suite.json"
    file.write_text(json.dumps({"name": "tiny", "output": str(folder / "runs"), "base": base, **keys}))
    return file


def write_results(file: Path, suite: Suite | Path, given: Callable[[PlannedRun], Given | None]) -> Path:
    """Write what a formula gives for each result of a suite; None leaves it out."""
    suite = load_suite(suite) if isinstance(suite, Path) else suite
    rows = []
    for run in suite.runs:
        for stage in run.stages:
            fields = given(run) if stage.is_result else None
            if fields is None:
                continue
            name = stage.folder.relative_to(suite.output).as_posix()
            word = "done" if fields.get("loss") is not None else "diverged"
            fields = {"word": word, "step": stage.config.train_steps, "vocab_size": VOCABULARY, **fields}
            rows.append(Outcome(run=name, config=compared(stage.config), **fields).as_row())
    file.write_text(json.dumps({"format": "study-results", "version": 1, "suite": suite.name, "results": rows}))
    return file


def valley(rate: float, best: float, lowest: float, width: float = 0.05) -> float:
    """Return a loss that is a parabola in the logarithm of the rate."""
    return lowest + width * math.log(rate / best) ** 2
