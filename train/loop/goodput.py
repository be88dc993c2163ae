"""Counts where a run's wall time goes, over all its restarts.

    steps         forward, backward, optimizer of steps whose result the run still stands on
    data          waiting for the next batch
    save          waiting for a checkpoint
    evaluation
    start_up      from the start of the process to the end of its first step, which compiles
    lost          steps done again after a failure or after going back
    down          from the last record of one process to the start of the next
    other         logging and what is left

Goodput is the share of `steps`. goodput.json keeps the seconds. Rank 0 counts for all ranks, since they run in step.
"""

import json
import time
from pathlib import Path

import psutil

from data.files.own import write_atomically
from train.run.names import GOODPUT
from train.run.reader import RunReader

CATEGORIES = ("steps", "data", "save", "evaluation", "start_up", "lost", "down", "other")


class Goodput:
    """Adds up seconds by category.

    Args:
        folder: run directory that has goodput.json; None counts without a file.
        lost_s: seconds of steps that an earlier process of this run did and this one repeats.
    """

    def __init__(self, folder: Path | None, lost_s: float = 0.0) -> None:
        self._path = folder / GOODPUT if folder is not None else None
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        process_started = psutil.Process().create_time()
        kept = RunReader(folder).goodput() if folder is not None else None
        if kept is not None:
            self.seconds.update({key: kept["seconds"][key] for key in CATEGORIES})
            self.seconds["down"] += max(0.0, process_started - kept["updated"])
            self.lose(lost_s)
        self._marked = process_started

    def spent(self, category: str, of_which_data_s: float = 0.0) -> None:
        """Count the time since the last call as `category`, except for the given wait for data."""
        now = time.time()
        passed, self._marked = now - self._marked, now
        data_s = min(passed, of_which_data_s)
        self.seconds[category] += passed - data_s
        self.seconds["data"] += data_s

    def lose(self, seconds: float) -> None:
        """Count this many seconds of steps as lost, since they have to be done again."""
        moved = min(seconds, self.seconds["steps"])
        self.seconds["steps"] -= moved
        self.seconds["lost"] += moved

    @property
    def share(self) -> float:
        return self.seconds["steps"] / max(sum(self.seconds.values()), 1e-9)

    def write(self) -> None:
        if self._path is not None:
            row = {"updated": time.time(), "goodput": self.share, "seconds": self.seconds}
            write_atomically(self._path, json.dumps(row, indent=1) + "\n")

    def __str__(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        rest = ", ".join(f"{key} {value / total:.1%}" for key, value in self.seconds.items() if key != "steps")
        return f"goodput {self.share:.1%} of {total:,.0f} s; {rest}"
