"""Measures one process and judges layouts against it."""

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parallel.layout import Layout
from parallel.local_ranks import RankError
from parallel.names import listed
from train.compare.comparison import TOLERANCE, Allowance, Comparison, compare
from train.compare.measurement import CONFIGURED, Measured, measure
from train.config import Config


class OneProcess:
    """The measured single process that layouts are compared with.

    Args:
        config: for one process.
        batches: global batches of tokens, [count, batch, T + 1].
        dtype: 'float32' or 'float64'.
        tolerance: the largest error, if the user sets one. Rounding in float32 is then no excuse.

    Raises:
        RankError: the process failed.
    """

    def __init__(
        self, config: Config, vocab_size: int, batches: Tensor, dtype: str, tolerance: float | None = None
    ) -> None:
        self.config, self.vocab_size, self.batches, self.dtype = config, vocab_size, batches, dtype
        self.tolerance: float | None = TOLERANCE[dtype] if tolerance is None else tolerance
        self.excused = dtype == "float32" and tolerance is None
        self.measured = self.measure(config, 1, dtype)

    def measure(self, config: Config, world_size: int, dtype: str) -> Measured:
        """Measure a layout on the same batches."""
        return measure(config, world_size, self.vocab_size, self.batches, dtype)

    @property
    def words(self) -> str:
        """Describe the arithmetic of the process and the layouts."""
        return self.dtype

    @property
    def limit_words(self) -> str:
        return f"{self.tolerance:g}"

    @property
    def warnings(self) -> list[str]:
        """Return warnings about gradients that cannot be judged, or only roughly."""
        return []

    @cached_property
    def rounding(self) -> Comparison | None:
        """Compare one process in float32 with float64; None if rounding is no excuse, or float64 does not run."""
        try:
            return compare(self.measured, self.measure(self.config, 1, "float64")) if self.excused else None
        except RankError:
            return None

    def try_layout(self, config: Config, layout: Layout) -> dict[str, Any]:
        """Run a layout. Return its errors and verdict, or the error that ended it."""
        try:
            found = self.measure(config, layout.world_size, self.dtype)
        except RankError as error:
            return {"error": str(error).strip(), "rounding": None, "passed": False}
        return {**self.judge(found), "sent_bytes": found.sent_bytes}

    def judge(self, found: Measured) -> dict[str, Any]:
        """Return a layout's errors and whether they are allowed."""
        assert self.tolerance is not None
        result = compare(found, self.measured)
        rounding = None if result.within(self.tolerance) else self.rounding
        passed = result.within(self.tolerance, rounding)
        return {**dataclasses.asdict(result), "rounding": rounding and dataclasses.asdict(rounding), "passed": passed}


class OneProcessAsTrained(OneProcess):
    """One process in float64, and the error that one process has in the arithmetic of training.

    Args:
        config: for one process, as it would train.
        exact: the same in float32, not compiled.

    Raises:
        RankError: the process failed.
    """

    def __init__(self, config: Config, exact: Config, vocab_size: int, batches: Tensor) -> None:
        self.config, self.vocab_size, self.batches, self.dtype = config, vocab_size, batches, CONFIGURED
        self.tolerance, self.excused = None, False
        self.truth_dtype = "float64"
        try:
            self.measured = self.measure(exact, 1, "float64")
        except RankError:  # too large, for instance
            self.truth_dtype = "float32"
            self.measured = self.measure(exact, 1, "float32")
        self.precision = config.training.resolved_precision(torch.cuda.is_available())
        self.allowance = Allowance.of(self.measure(config, 1, CONFIGURED), self.measured, self.precision)

    @property
    def words(self) -> str:
        compiled = "compiled" if self.config.training.compiles(torch.cuda.is_available()) else "not compiled"
        return f"layouts in {self.precision}, {compiled}, as they train, against {self.truth_dtype}"

    @property
    def limit_words(self) -> str:
        return "its own rounding in that arithmetic"

    @property
    def warnings(self) -> list[str]:
        lost, unseen = self.allowance.lost, self.allowance.unseen
        said = [f"LOST by one process as it trains, so that no layout passes: {listed(lost)}"] if lost else []
        small = f"too small to be seen in {self.precision}, unless lost (--dtype float64 shows more): {listed(unseen)}"
        return [*said, small] if unseen else said

    def judge(self, found: Measured) -> dict[str, Any]:
        result = compare(found, self.measured, self.allowance)
        allowed = self.allowance.gradient[result.worst_parameter]
        passed = self.allowance.covers(result)
        one_process = {"lost_by_one_process": self.allowance.lost, "unseen": self.allowance.unseen}
        return {**dataclasses.asdict(result), "allowed": allowed, **one_process, "rounding": None, "passed": passed}
