"""Counts where a run's wall time goes, over all its restarts.

    steps         forward, backward, optimizer of steps whose result the run still stands on
    data          waiting for the next batch
    save          waiting for a checkpoint
    evaluation
    start_up      from the start of the process to the end of its first step, which compiles
    lost          steps done again after a failure or after going back
    down          from the last record of one process to the start of the next, if that is not over 30 days
    other         logging and what is left

Goodput is the share of `steps`. goodput.json keeps the seconds. Rank 0 counts for all ranks, since they run in step.

No clock is trusted that somebody may set. Within a process the monotonic clock counts. Between two processes on one
machine the time since it was started counts; between machines the wall clock does, if its difference is credible.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from data.files.own import open_to_read, set_aside, write_atomically
from data.files.strict_json import to_json
from train.run.names import GOODPUT
from train.run.reader import RunError, RunReader
from train.run.rows import Damage

CATEGORIES = ("steps", "data", "save", "evaluation", "start_up", "lost", "down", "other")
MOST_DOWN_S = 30 * 86400.0
"""Nobody waits that long for a run to go on. A longer time is that of a clock that was set."""
MOST_START_S = 86400.0
MOST_KEPT_S = 1e10
"""Three centuries: more in a file is damage."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STATUS = Path("/proc/self/stat")


class Goodput:
    """Adds up seconds by category.

    Args:
        folder: run directory that has goodput.json; None counts without a file. A file that is damaged is set aside.
        lost_s: seconds of steps that an earlier process of this run did and this one repeats.

    Attributes:
        damage: what was wrong with the file; None if nothing was.
    """

    def __init__(self, folder: Path | None, lost_s: float = 0.0) -> None:
        self._path = folder / GOODPUT if folder is not None else None
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.damage: Damage | None = None
        age_s = process_age_s()
        kept = None if folder is None else self._kept(folder)
        if kept is not None:
            self.seconds.update({key: float(kept["seconds"][key]) for key in CATEGORIES})
            self.seconds["down"] += down_s(kept, age_s)
            self.lose(lost_s)
        self._marked = time.monotonic() - age_s

    def spent(self, category: str, of_which_data_s: float = 0.0) -> None:
        """Count the time since the last call as `category`, except for the given wait for data."""
        now = time.monotonic()
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
            row = {**moment(), "goodput": self.share, "seconds": self.seconds}
            write_atomically(self._path, to_json(row, indent=1) + "\n")

    def __str__(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        rest = ", ".join(f"{key} {value / total:.1%}" for key, value in self.seconds.items() if key != "steps")
        return f"goodput {self.share:.1%} of {total:,.0f} s; {rest}"

    def _kept(self, folder: Path) -> dict[str, Any] | None:
        """Read the file; set it aside if it holds anything but the seconds of a run."""
        file = folder / GOODPUT
        try:
            kept = RunReader(folder).goodput()
            wrong = [] if kept is None else [key for key in CATEGORIES if not _is_seconds(kept["seconds"].get(key))]
            if not wrong:
                return kept
            fault = f"damaged, seconds.{wrong[0]} is no number of seconds"
        except RunError as error:
            fault = str(error).removeprefix(f"{file}: ").rpartition(";")[0]
        with contextlib.suppress(OSError):
            self.damage = Damage(
                file, f"{fault}; the time of earlier processes is not counted", set_aside(file).name, {}
            )
        return None


def moment() -> dict[str, Any]:
    """Return what time it is: `updated` by the wall clock, and since which start of the machine so many seconds."""
    return {"updated": time.time(), "boot_id": boot_id(), "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME)}


def down_s(kept: dict[str, Any], age_s: float) -> float:
    """Return the seconds from a `moment` until this process started; 0 if the clocks give no credible number.

    Args:
        kept: the moment. Earlier versions kept `updated` alone.
        age_s: of this process.
    """
    now = moment()
    on_one_clock = kept.get("boot_id") == now["boot_id"] is not None and _is_seconds(kept.get("uptime_s"))
    key = "uptime_s" if on_one_clock else "updated"
    passed_s = now[key] - kept[key] - age_s
    return float(passed_s) if 0 <= passed_s <= MOST_DOWN_S else 0.0


def process_age_s() -> float:
    """Return the seconds since this process started, as the kernel counts them; 0 if it does not tell."""
    try:
        with open_to_read(STATUS) as file:
            fields = file.read(4096).rpartition(b")")[2].split()  # the name before it may hold anything
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    return age_s if 0 <= age_s <= MOST_START_S else 0.0


def boot_id() -> str | None:
    """Return what the kernel calls this run of the machine; None if it does not tell."""
    try:
        with open_to_read(BOOT_ID) as file:
            return file.read(100).decode("ascii", "replace").strip() or None
    except OSError:
        return None


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MOST_KEPT_S
