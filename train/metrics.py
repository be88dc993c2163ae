"""Metrics of a run: every step has its row, but the device is asked only at logging steps.

Between logging steps each rank keeps its parts of the losses, the gradient norm and a time mark on the device; `flush`
sums them over ranks in one reduction and fetches them together.
"""

import time
from typing import Any

import torch
from torch import Tensor

from parallel.megatron import Groups
from parallel.stage import StageStatistics
from parallel.telemetry import loss_parts, sum_over_ranks


class StepMetrics:
    """Collects what each step leaves behind; all ranks hold one and flush together."""

    def __init__(self, groups: Groups, tokens_per_step: int) -> None:
        self.groups, self.tokens_per_step = groups, tokens_per_step
        self._parts: list[Tensor] = []
        self._steps: list[tuple[int, float]] = []
        self._clock = StepClock()

    def start(self) -> None:
        """Marks the beginning of the next step; call after anything that is not training."""
        self._clock.mark()

    def record(
        self, step: int, learning_rate: float, statistics: StageStatistics, gradient_norm: Tensor | float
    ) -> None:
        parts = loss_parts(statistics, self.groups)
        norm = torch.as_tensor(gradient_norm, dtype=parts.dtype, device=parts.device).reshape(1)
        if self.groups.grid.rank != 0:
            norm = torch.zeros_like(norm)
        self._parts.append(torch.cat([parts, norm]))
        self._steps.append((step, learning_rate))
        self._clock.mark(ends_step=True)

    def flush(self) -> list[dict[str, Any]]:
        """Rows of the steps since the last flush, with global values."""
        values = sum_over_ranks(torch.stack(self._parts)).tolist()
        times_s = self._clock.step_times_s()
        memory = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}
        rows = []
        for (step, rate), (cross_entropy, entropy_loss, norm), step_time_s in zip(
            self._steps, values, times_s, strict=True
        ):
            rows.append(
                {
                    "step": step,
                    "tokens": step * self.tokens_per_step,
                    "loss": cross_entropy + entropy_loss,
                    "ce_loss": cross_entropy,
                    "entropy_loss": entropy_loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "step_time_s": step_time_s,
                    "tokens_per_second": self.tokens_per_step / step_time_s,
                    **memory,
                }
            )
        self._parts, self._steps = [], []
        return rows


class StepClock:
    """Times of steps without waiting for the device: events on a GPU, the host's clock on a CPU."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._intervals: list[tuple[Any, Any]] = []
        self._last: Any = None

    def mark(self, ends_step: bool = False) -> None:
        now = self._now()
        if ends_step:
            self._intervals.append((self._last, now))
        self._last = now

    def step_times_s(self) -> list[float]:
        """Durations of the steps since the last call, in seconds; on a GPU this waits for the last step."""
        intervals, self._intervals = self._intervals, []
        if not self._on_gpu:
            return [end - start for start, end in intervals]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in intervals]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
