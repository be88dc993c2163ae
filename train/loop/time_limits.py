"""Limits how long each section of a run may take; a rank that exceeds a limit writes its stacks and exits.

If one rank hangs, the others wait for it in a collective of the same section, so all exceed their limits at about the
same time. A rank that died is noticed by the launcher at once.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data.files.own import open_to_append
from train.config import Config
from train.faults import TIMED_OUT
from train.run.journal import Journal
from train.run.names import STACKS

SECTIONS = ("start", "step", "save", "evaluation")
GRACE_S = 30.0
"""Seconds after which the interpreter's C code dumps the stacks and exits, in case Python itself is stuck."""
REARM_S = 15.0
"""Seconds between postponements of that: each costs a thread, which is too much for every step."""


class TimeLimits:
    """Watches the section that this rank is in; writes stacks to run_dir/stacks/rank_00000.txt and standard error."""

    def __init__(self, config: Config, rank: int) -> None:
        self._file, self._rank = Path(config.run_dir) / STACKS / f"rank_{rank:05d}.txt", rank
        self._limits_s = {name: getattr(config.health, f"{name}_limit_s") for name in SECTIONS}
        self._changed = threading.Condition()
        self._section: tuple[str, float, float] | None = None  # name, limit, when it ends
        self._armed = ("", 0.0)
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="time limits", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Limit a section to health.<name>_limit_s seconds; of nested sections only the inner one is limited."""
        outer, limit_s = self._section, self._limits_s[name]
        self._enter((name, limit_s, time.monotonic() + limit_s))
        try:
            yield
        finally:
            self._enter(outer and (outer[0], outer[1], time.monotonic() + outer[1]))

    @property
    def longest_s(self) -> float:
        return max(self._limits_s.values())

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _enter(self, section: tuple[str, float, float] | None) -> None:
        self._section = section  # the watcher polls; waking it at every step would cost more
        now = time.monotonic()
        if section is None:
            self._armed = ("", 0.0)
            faulthandler.cancel_dump_traceback_later()
        elif section[0] != self._armed[0] or now - self._armed[1] > REARM_S:
            self._armed = (section[0], now)
            faulthandler.dump_traceback_later(section[1] + REARM_S + GRACE_S, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._closed:
            section = self._section
            left_s = section[2] - time.monotonic() if section is not None else 1.0
            if section is not None and left_s <= 0:
                self._expire(section)
            with self._changed:
                self._changed.wait(min(1.0, max(left_s, 0.01)))

    def _expire(self, section: tuple[str, float, float]) -> None:
        name, limit_s, _ = section
        text = (
            f"error: rank {self._rank}: the section {name!r} has not ended within health.{name}_limit_s = {limit_s:g} "
            f"seconds; stacks of all threads are in {self._file}"
        )
        print(text, file=sys.__stderr__, flush=True)
        with contextlib.suppress(OSError):
            if self._rank == 0:
                Journal(self._file.parents[1]).write("time limit", section=name, limit_s=limit_s)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self._file) as file:
                file.truncate(0)
                file.write(f"{text}\n".encode())
                faulthandler.dump_traceback(file)
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(TIMED_OUT)
