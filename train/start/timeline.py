"""Record where the time of a start goes, and show on rank 0 what it is waiting for.

    begin(show=True)
    with phase("weights"):
        ...
    seconds = finish()  # {"python": 0.4, "weights": 1.9}

A start reaches from the start of the process to the end of the first step. Phases may be nested; the inner one then
interrupts the outer one, so the seconds add up to the whole. In a process that has not called `begin`, as in other
commands, a phase does nothing.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PHASES = {
    "python": "start of the interpreter",
    "check": "read and check configuration and dataset",
    "ranks": "wait for the other ranks",
    "import": "import DeepSpeed, megatron-core and torch's compiler",
    "join": "join the process group",
    "find_checkpoint": "look for a checkpoint and verify its files",
    "weights": "draw the initial weights",
    "initial_weights": "read and convert the weights of checkpoint.init_from",
    "teacher": "read the teacher",
    "optimizer": "build DeepSpeed's engine",
    "data": "open the dataset",
    "load_checkpoint": "load the checkpoint",
    "first_step": "run the first step",
    "compile": "compile a block, or load its compiled code",
    "other": "what lies between",
}
"""Every phase, and what is done in it."""
SHOWN_AFTER_S = 5.0
"""A phase that lasts longer is shown, and shown again after as many seconds."""


class Timeline:
    """The phases of one start.

    Args:
        show: whether to print what takes long.
        began: when the start began, by `time.monotonic`; the time since then counts as "python".
    """

    def __init__(self, show: bool, began: float) -> None:
        self._seconds = {"python": time.monotonic() - began}
        self._open, self._since, self._about = ["other"], time.monotonic(), ""
        self._lock, self._ended = threading.Lock(), threading.Event()
        if show:
            threading.Thread(target=self._show, name="start timeline", daemon=True).start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time in the context as phase `name` of PHASES."""
        outer = list(self._open)
        self._enter(name)
        try:
            yield
        finally:
            self._return_to(outer)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Count torch's compilations in the context as phase "compile"."""
        from torch._dynamo.callback import callback_handler

        outer = list(self._open)

        def enter(*_: Any) -> None:
            self._enter("compile")

        def leave(*_: Any) -> None:
            self._return_to(outer)

        callback_handler.register_start_callback(enter)
        callback_handler.register_end_callback(leave)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(enter)
            callback_handler.remove_end_callback(leave)

    def describe(self, about: str) -> None:
        """Say more about what the phase is waiting for, until it ends."""
        with self._lock:
            self._about = about

    def finish(self) -> dict[str, float]:
        """End the start; return the seconds of each phase, rounded to hundredths, in the order of PHASES."""
        with self._lock:
            self._count()
            self._ended.set()
            return {name: round(self._seconds[name], 2) for name in PHASES if name in self._seconds}

    def _enter(self, name: str) -> None:
        assert name in PHASES, name
        with self._lock:
            self._count()
            self._open.append(name)

    def _return_to(self, phases: list[str]) -> None:
        with self._lock:
            self._count()
            self._open = list(phases)

    def _count(self) -> None:
        now, name = time.monotonic(), self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since, self._about = now, ""

    def _show(self) -> None:
        while not self._ended.wait(SHOWN_AFTER_S):
            with self._lock:
                words, lasted_s = PHASES[self._open[-1]], time.monotonic() - self._since
                words += f": {self._about}" if self._about else ""
            if lasted_s >= SHOWN_AFTER_S:
                print(f"start: {words} ({lasted_s:.0f} s so far)", flush=True)


_running: Timeline | None = None


def begin(show: bool) -> None:
    """Begin to record this process's start; `show` prints what takes long."""
    global _running
    if _running is not None:
        _running.finish()
    _running = Timeline(show, time.monotonic() - _age_s())


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Count the time in the context as phase `name` of PHASES, if a start is being recorded."""
    return contextlib.nullcontext() if _running is None else _running.phase(name)


def describe(about: str) -> None:
    """Say more about what the current phase is waiting for, if a start is being recorded."""
    if _running is not None:
        _running.describe(about)


def compiling() -> contextlib.AbstractContextManager[None]:
    """Count torch's compilations in the context as phase "compile", if a start is being recorded."""
    return contextlib.nullcontext() if _running is None else _running.compiling()


def finish() -> dict[str, float]:
    """End the start and return the seconds of each phase; empty if none was being recorded."""
    global _running
    ended, _running = _running, None
    return {} if ended is None else ended.finish()


def words(seconds: dict[str, float]) -> str:
    """Return one line: "first step done 9.1 s after the start: import 4.0 s, ..."; short phases are left out."""
    total = sum(seconds.values())
    longest = sorted((name for name in seconds if seconds[name] >= 0.05 * total), key=lambda name: -seconds[name])
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds[name]:.1f} s" for name in longest)
    return f"first step done {total:.1f} s after the start: {parts}"


def _age_s() -> float:
    """Return how long this process has existed, in seconds."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
