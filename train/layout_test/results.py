"""Reads what a run left, and judges it.

The truth is one process in float32, not compiled. The baseline is one process as it trains: bf16, compiled. It differs
from the truth by rounding, and each parameter has its own scale. A layout rounds as often, in another order, and may
have the errors that `train.compare.comparison` allows. A gradient is lost, whatever its size, if it is exactly zero or
missing where the truth has one; single numbers may cancel by chance (`lost_in_one_step`). If the baseline loses one, no
layout passes.

Losses of all steps are compared with the baseline's, whose weights are rounded alike. They may differ from it as much
as the baseline differs from the truth. A missing loss, or one that is not finite, is beyond any limit.

Gradients are read where the optimizer reads them, after clipping: Adam's first moment after the first step.
"""

import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel.names import listed
from train.checkpoint.folder import Folder
from train.checkpoint.root import OwnedRoot
from train.checkpoint.tensors import Reader
from train.compare.comparison import ROUNDING as ROUNDINGS
from train.compare.comparison import gradient_errors, gradient_limits, lost_in_one_step, worst_of
from train.run.directory import recorded_run_id
from train.run.identity import new_run_id
from train.run.names import CHECKPOINTS
from train.run.reader import RunReader

ROUNDING = ROUNDINGS["bf16"]
FIRST_MOMENT = "exp_avg."


@dataclass(frozen=True)
class Trained:
    """What a run left: Adam's first moments after the first step, by global name, and the loss of every step."""

    moments: dict[str, Tensor]
    losses: list[float]
    gradient_norm: float


def read_run(folder: Path) -> Trained:
    """Read a run, then delete its checkpoints, which may be large."""
    run = RunReader(folder)
    rows = [row for row in run.metrics() if "loss" in row]
    reader = Reader(Folder(str(run.checkpoint(1))))
    saved = reader.read_metadata().state_dict_metadata
    moments: dict[str, Any] = {
        name: torch.empty(entry.size) for name, entry in saved.items() if name.startswith(FIRST_MOMENT)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.load(moments, storage_reader=reader, no_dist=True)
    OwnedRoot(Folder(str(folder / CHECKPOINTS)), recorded_run_id(folder) or new_run_id()).discard_all()
    plain = {name.removeprefix(FIRST_MOMENT): moment for name, moment in moments.items()}
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]  # JSON has no NaN
    return Trained(plain, losses, rows[0]["grad_norm"])


@dataclass(frozen=True)
class Verdict:
    """A layout compared with one process. Gradient errors are relative; loss errors are in nats."""

    passed: bool
    lost: list[str]
    lost_by_one_process: list[str]
    worst_parameter: str
    gradient_error: float
    gradient_limit: float
    loss_error_nats: float
    loss_limit_nats: float
    gradient_norm: float
    steps: int

    @property
    def words(self) -> str:
        if self.lost:
            return f"LOST {listed(self.lost)}"
        if self.lost_by_one_process:
            return f"one process LOST {listed(self.lost_by_one_process)}"
        return "ok" if self.passed else "BEYOND"


def judge(found: Trained, truth: Trained, baseline: Trained) -> Verdict:
    """Compare a layout with the truth, and allow it what the baseline differs from the truth."""
    allowed = gradient_limits(gradient_errors(baseline.moments, truth.moments), truth.moments, ROUNDING)
    errors = gradient_errors(found.moments, truth.moments)
    lost, worst = lost_in_one_step(found.moments, truth.moments), worst_of(errors, allowed)
    lost_by_one_process = lost_in_one_step(baseline.moments, truth.moments)
    loss_limit = _largest_difference(baseline.losses, truth.losses) + ROUNDING**2 * truth.losses[0]
    loss_error = _largest_difference(found.losses, baseline.losses)
    within = errors[worst] <= allowed[worst] and loss_error <= loss_limit
    return Verdict(
        passed=within and not (lost or lost_by_one_process),
        lost=lost,
        lost_by_one_process=lost_by_one_process,
        worst_parameter=worst,
        gradient_error=errors[worst],
        gradient_limit=allowed[worst],
        loss_error_nats=loss_error,
        loss_limit_nats=loss_limit,
        gradient_norm=found.gradient_norm,
        steps=len(found.losses),
    )


def _largest_difference(losses: list[float], others: list[float]) -> float:
    """Return NaN if any difference is NaN, or if one run has more steps than the other."""
    pairs = list(itertools.zip_longest(losses, others, fillvalue=math.nan))
    return float(torch.tensor(pairs, dtype=torch.float64).diff(dim=1).abs().max())
