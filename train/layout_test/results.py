"""What a run left, and the verdict on it.

The truth is one process in float32, uncompiled. One process as it trains (bf16, compiled) differs from it by rounding,
parameter by parameter. A layout rounds as often, in another order, so it may differ from the truth by FACTOR times as
much, and by one rounding of the type more where that is a lucky small number. A gradient that is exactly zero, or
missing, where the truth has one is lost, whatever its size. So it is with the losses of the steps.

Gradients are compared as the optimizer took them, after clipping: Adam's first moment after the first step.
"""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel.first_step import listed
from train.checkpoint import folder_name
from train.checkpoint_folder import Folder
from train.checkpoint_tensors import Reader
from train.run_dir import read_rows

FACTOR = 1.5
"""On two H200s the layouts' errors were 0.97 to 1.1 times those of one process."""
ROUNDING = 2.0**-8
"""Relative, of bf16."""
LOSS_FACTOR = 3.0
GRADIENT_FLOOR = 1e-2
"""Of the norm of all gradients: what is smaller is compared with this."""
FIRST_MOMENT = "exp_avg."


@dataclass(frozen=True)
class Trained:
    """What a run left: Adam's first moments after the first step by global name, and the losses of its steps."""

    moments: dict[str, Tensor]
    losses: list[float]
    gradient_norm: float


def read_run(folder: Path) -> Trained:
    """Reads a run and deletes its checkpoints, which may be large."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    reader = Reader(Folder(str(folder / "checkpoints" / folder_name(1))))
    saved = reader.read_metadata().state_dict_metadata
    moments: dict[str, Any] = {
        name: torch.empty(entry.size) for name, entry in saved.items() if name.startswith(FIRST_MOMENT)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.load(moments, storage_reader=reader, no_dist=True)
    shutil.rmtree(folder / "checkpoints")
    plain = {name.removeprefix(FIRST_MOMENT): moment for name, moment in moments.items()}
    return Trained(plain, [row["loss"] for row in rows], rows[0]["grad_norm"])


@dataclass(frozen=True)
class Verdict:
    """A layout against one process. Errors of gradients are relative, of losses in nats."""

    passed: bool
    lost: list[str]
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
        return "ok" if self.passed else "BEYOND"


def judge(found: Trained, truth: Trained, baseline: Trained) -> Verdict:
    """Compares a layout with the truth, and with how far one process as it trains is from that."""
    norms = {name: float(moment.norm()) for name, moment in truth.moments.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    allowed: dict[str, float] = {}
    for name, error in _errors(baseline, truth, norms, whole).items():
        allowed[_kind(name)] = max(allowed.get(_kind(name), 0.0), FACTOR * error + ROUNDING)
    errors = _errors(found, truth, norms, whole)
    lost = [name for name in norms if norms[name] > 0 and not _is_there(found.moments.get(name))]
    worst = max(errors, key=lambda name: errors[name] / allowed[_kind(name)])
    spread = max(abs(a - b) for a, b in zip(baseline.losses, truth.losses, strict=True))
    loss_limit = LOSS_FACTOR * spread + ROUNDING**2 * truth.losses[0]
    loss_error = max(abs(a - b) for a, b in zip(found.losses, truth.losses, strict=True))
    within = errors[worst] <= allowed[_kind(worst)] and loss_error <= loss_limit
    return Verdict(
        passed=within and not lost,
        lost=lost,
        worst_parameter=worst,
        gradient_error=errors[worst],
        gradient_limit=allowed[_kind(worst)],
        loss_error_nats=loss_error,
        loss_limit_nats=loss_limit,
        gradient_norm=found.gradient_norm,
        steps=len(found.losses),
    )


def _errors(found: Trained, truth: Trained, norms: dict[str, float], whole: float) -> dict[str, float]:
    return {
        name: float((found.moments[name] - moment).norm()) / max(norms[name], GRADIENT_FLOOR * whole, 1e-30)
        if name in found.moments
        else float("inf")
        for name, moment in truth.moments.items()
    }


def _is_there(moment: Tensor | None) -> bool:
    return moment is not None and bool(moment.isfinite().all()) and bool(moment.any())


def _kind(name: str) -> str:
    """A parameter's name in any layer, so that an error that is small by luck in one layer is no trap."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
