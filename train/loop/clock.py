"""The clock of a run: every part of the loop is a section, which is limited, counted and kept out of step times.

    with clock.section("save"):
        saver.save(...)

SECTIONS says which limit of the configuration a section has and what its seconds count as in goodput.json. A section
inside another one has its own limit and count; the outer one goes on after it.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train.config import Config
from train.loop.goodput import Goodput
from train.loop.time_limits import TimeLimits
from train.run.rows import Damage

SECTIONS = {
    # section: (limit: health.<...>_limit_s, category of goodput)
    "start_up": ("start", "start_up"),
    "first_step": ("start", "start_up"),
    "step": ("step", "steps"),
    "log": ("step", "other"),
    "evaluation": ("evaluation", "evaluation"),
    "save": ("save", "save"),
    "go_back": ("start", "other"),
}
STEPS = ("first_step", "step")


class Clock:
    """Limits and counts the sections of one rank's run.

    Attributes:
        limits: ends the process if a section takes too long.
        goodput: seconds by category over all of the run's restarts; rank 0 keeps them in a file (`keep_goodput`).
        steps: the time of each step.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self.limits = TimeLimits(config, rank)
        self.goodput = Goodput(None)
        self.steps = StepClock()
        self._data_wait_s = 0.0

    def keep_goodput(self, folder: Path, lost_s: float) -> Damage | None:
        """Go on with the seconds in `folder`; `lost_s` of earlier steps have to be done again.

        Returns:
            What is wrong with the file that keeps them; None if nothing is.
        """
        self.goodput = Goodput(folder, lost_s)
        return self.goodput.damage

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Run a section of SECTIONS; after an error nothing is counted."""
        limit, category = SECTIONS[name]
        with self.limits.section(limit):
            yield
        self.goodput.spent(category, self._data_wait_s)
        self._data_wait_s = 0.0
        if name not in STEPS:
            self.steps.mark()

    def waited_for_data(self, seconds: float) -> None:
        """Count so much of the section that is running as a wait for data."""
        self._data_wait_s += seconds

    def close(self) -> None:
        self.limits.close()


class StepClock:
    """Times steps without waiting for the device: with events on a GPU, with the host's clock on a CPU."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._intervals: list[tuple[Any, Any]] = []
        self._last: Any = None

    def mark(self, ends_step: bool = False) -> None:
        """Mark the end of a step, or the end of something else that is not to count as part of the next step."""
        now = self._now()
        if ends_step:
            self._intervals.append((self._last, now))
        self._last = now

    def step_times_s(self) -> list[float]:
        """Return the seconds of each step since the last call; on a GPU, wait for the last of them."""
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
