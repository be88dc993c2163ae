"""Shows a run's progress: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from data.errors import printable


class ProgressDisplay:
    """Shows steps as they are logged; `first_step` is where a resumed run starts."""

    def __init__(self, train_steps: int, first_step: int) -> None:
        self._started_s, self._first_step, self._train_steps = time.monotonic(), first_step, train_steps
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=train_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def show_step(self, row: dict[str, Any]) -> None:
        """Show a logged step, given its row of metrics.jsonl."""
        numbers = f"loss {row['loss']:.4f}  tokens/s {row['tokens_per_second']:,.0f}"
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            self._bar.set_postfix_str(numbers, refresh=False)
        else:
            print(
                f"step {row['step']}/{self._train_steps}  {numbers}  time left {self._time_left(row['step'])}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print lines that stay, above the bar."""
        text = printable(text, keep="\n")
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        elapsed_s = time.monotonic() - self._started_s
        return format_duration(elapsed_s * (self._train_steps - step) / max(1, step - self._first_step))


def format_duration(seconds: float) -> str:
    """Format seconds as '0:42', '12:05' or '3:07:10'."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
