"""Decides which steps may change the weights, and when skipping steps no longer helps.

A step is refused if its loss or gradient norm is not finite, or lies far above those of recent accepted steps. Distance
is counted in robust standard deviations (1.4826 times the median absolute deviation) of the loss in nats and of the
logarithm of the norm. A floor under the deviation keeps a very quiet run from calling ripples spikes.

The device compares a step with limits that were computed before it, so nothing waits. Every rank computes the same
limits, because the numbers are already reduced over all ranks. Limits never use the step just before, even if its
numbers are there already, and what they use is saved. So a resumed run refuses the steps that an uninterrupted run
would.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from parallel.engine.telemetry import FINITE, StepLimits, StepReport
from train.config.sections import RECENT_STEPS, HealthConfig

UNSEEN_STEPS = 1  # just before the step that limits are for: still running on the device
LEAST_LOSS_DEVIATION_NATS = 0.05
LEAST_LOG_NORM_DEVIATION = 0.125
MOST_LOG_NORM = 700.0  # its exponential is still a float


class Health:
    """The recent steps of a run, and what follows from them."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.reason: str | None = None
        """Why the last step was refused; None where it was accepted."""
        self._rollbacks = 0
        self._trouble_step = 0
        self.forget()

    def forget(self) -> None:
        """Clear the history, as after going back; how often the run went back is kept."""
        self._accepted: deque[tuple[int, float, float]] = deque(maxlen=self.config.window + UNSEEN_STEPS)
        """Step, loss, logarithm of the gradient norm."""
        self._refused: deque[bool] = deque(maxlen=RECENT_STEPS)

    def limits(self, step: int) -> StepLimits:
        """Return the limits for `step`, computed from accepted steps up to two before it."""
        seen = [each for each in self._accepted if each[0] < step - UNSEEN_STEPS][-self.config.window :]
        if not self.config.spike_factor or len(seen) < max(2, self.config.window // 4):
            return FINITE
        loss = _limit([loss for _, loss, _ in seen], self.config.spike_factor, LEAST_LOSS_DEVIATION_NATS)
        log_norm = _limit([norm for _, _, norm in seen], self.config.spike_factor, LEAST_LOG_NORM_DEVIATION)
        return StepLimits(loss, math.exp(min(log_norm, MOST_LOG_NORM)))

    def remember(self, step: int, report: StepReport, limits: StepLimits) -> None:
        """Record what a step measured that ran under these limits."""
        self.reason = None if report.accepted else reason_against(report, limits)
        self._refused.append(not report.accepted)
        if report.accepted:
            self._accepted.append((step, report.loss, math.log(max(report.gradient_norm, 1e-30))))

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for a checkpoint."""
        return {"accepted": [list(each) for each in self._accepted], "refused": list(self._refused)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget()
        self._accepted.extend((step, loss, log_norm) for step, loss, log_norm in state["accepted"])
        self._refused.extend(state["refused"])

    @property
    def must_go_back(self) -> bool:
        """Whether skipping single steps has not helped."""
        return sum(self._refused) >= self.config.skip_limit

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was refused, so that this is no moment to save."""
        return self.reason is not None

    def first_refused(self, step: int) -> int:
        """Return the first of the recent refused steps; `step` is the last step run."""
        return step - len(self._refused) + 1 + list(self._refused).index(True)

    def may_go_back(self, step: int) -> bool:
        """Count a return from `step`; False if the run has gone back too often for the same trouble."""
        if step > self._trouble_step + RECENT_STEPS:
            self._rollbacks = 0
        self._trouble_step = max(step, self._trouble_step)
        self._rollbacks += 1
        return self._rollbacks <= self.config.rollback_limit


def reason_against(report: StepReport, limits: StepLimits) -> str:
    """Say why a step was refused."""
    if not math.isfinite(report.loss):
        return f"the loss is {report.loss}"
    if not math.isfinite(report.gradient_norm):
        return "the gradients are not finite"
    if report.loss > limits.loss:
        return f"the loss {report.loss:.4f} is above {limits.loss:.4f}, far above recent steps"
    norm, limit = report.gradient_norm, limits.gradient_norm
    return f"the gradient norm {norm:.4g} is above {limit:.4g}, far above recent steps"


def _limit(values: Iterable[float], factor: float, least_deviation: float) -> float:
    ordered = list(values)
    median = statistics.median(ordered)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in ordered)
    return median + factor * max(deviation, least_deviation)
