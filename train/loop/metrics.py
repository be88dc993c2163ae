"""Collects a row of metrics for every step, timed without waiting for the device."""

import statistics
from typing import Any

import torch

from parallel.engine.telemetry import StepReport
from parallel.launch import world_size
from train.config import Config
from train.cost.flops import mfu, mfu_statement, training_flops_per_token
from train.loop.clock import StepClock


class StepMetrics:
    """Collects rows as steps are read; `flush` returns them at logging steps, when their times are known."""

    def __init__(self, config: Config, vocab_size: int, clock: StepClock) -> None:
        self.tokens_per_step = config.tokens_per_step
        self._flops_per_token = training_flops_per_token(config.model, vocab_size)
        self._device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.mfu_words = ""
        self._rows: list[dict[str, Any]] = []
        self._clock = clock

    def record(
        self,
        step: int,
        first_sample: int,
        learning_rate: float,
        report: StepReport,
        refused: str | None,
        data_wait_s: float,
    ) -> None:
        """Add the row of a step that read samples from `first_sample` on; `refused` says why, if it was refused."""
        self._rows.append(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "first_sample": first_sample,
                "loss": report.loss,
                **report.means,
                "learning_rate": learning_rate,
                "grad_norm": report.gradient_norm,
                **({"skipped": refused} if refused is not None else {}),
                "data_wait_s": data_wait_s,
            }
        )

    def flush(self) -> list[dict[str, Any]]:
        """Return the rows of all steps since the last flush; each must have been recorded."""
        times_s = self._clock.step_times_s()
        memory = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}
        rows, self._rows = self._rows, []
        if times_s and torch.cuda.is_available():
            usual = self.tokens_per_step / statistics.median(times_s)
            self.mfu_words = mfu_statement(usual, self._flops_per_token, self._device, world_size())
        for row, step_time_s in zip(rows, times_s, strict=True):
            tokens_per_second = self.tokens_per_step / step_time_s
            share = mfu(tokens_per_second, self._flops_per_token, self._device, world_size())
            row.update(step_time_s=step_time_s, tokens_per_second=tokens_per_second, **memory)
            row.update({} if share is None else {"mfu": share})
        return rows

    @property
    def last_row(self) -> dict[str, Any]:
        """The row of the last step recorded, without its time."""
        return self._rows[-1]
