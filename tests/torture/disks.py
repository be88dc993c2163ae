"""Full and broken disks, and clocks that jump: faults inside the process, where no root rights are needed."""

import builtins
import errno
import io
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, errors, judged
from tests.torture.processes import Tamper
from tests.torture.stand import LAYOUTS, ONE

HALF_BYTES = 1_000_000
"""About what a run of one process writes."""


class BadDisk:
    """Files below a folder fail to be written, after some bytes or calls, for a while or for ever.

    Args:
        folder: what lies below it is on the bad disk.
        number: the error, errno.ENOSPC or errno.EIO.
        after: bytes written, or calls of the function `which` made, before the first failure.
        failures: how many calls fail.
        which: "write", or a function of os: "fsync", "rename", "replace", "open", "mkdir".
    """

    def __init__(self, folder: Path, number: int, after: int, failures: int, which: str) -> None:
        self.folder, self.number, self.after, self.failures, self.which = str(folder), number, after, failures, which
        self.file_io = _failing_file_io(self)

    def spend(self, path: Any, amount: int) -> None:
        """Count bytes or a call; raise OSError if the disk is full by now."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not os.fspath(path).startswith(self.folder):
            return
        self.after -= amount
        if self.after < 0 and self.failures > 0:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number), os.fspath(path))

    def install(self, rank: int) -> None:
        """Replace the functions of this process that write."""
        if self.which == "write":
            real_open, real_write = io.open, os.write

            def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
                if not set(mode) & set("wax+") or named.get("closefd") is False:
                    return real_open(file, mode, buffering, *args, **named)
                return self._opened(file, mode, buffering, *args, **named)

            def write(fd: int, content: Any) -> int:
                self.spend(fd, len(content))
                return real_write(fd, content)

            builtins.open = io.open = open_  # type: ignore[assignment]
            os.write = write
            return
        real: Callable[..., Any] = getattr(os, self.which)

        def counted(path: Any, *args: Any, **named: Any) -> Any:
            self.spend(path, 1)
            return real(path, *args, **named)

        setattr(os, self.which, counted)

    def _opened(
        self,
        file: Any,
        mode: str,
        buffering: int,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        raw = self.file_io(file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener)
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


def _failing_file_io(disk: BadDisk) -> type[io.FileIO]:
    class FailingFileIO(io.FileIO):
        def write(self, content: Any) -> int:
            disk.spend(self.fileno(), len(content))
            return super().write(content)

    return FailingFileIO


@attack("disks")
def disk_fails(trial: Trial) -> Outcome:
    """The disk of the run is full or broken from some write, fsync, rename or open on, for a while or for ever."""
    layout = trial.random.choice([ONE, ONE, LAYOUTS[1]])
    number = trial.random.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
    which = trial.random.choice(["write", "write", "write", "fsync", "rename", "replace", "open", "mkdir"])
    after = trial.random.randrange(HALF_BYTES) if which == "write" else trial.random.randrange(20)
    failures = trial.random.choice([1, 2, 10**9])
    run = trial.folder / "run"
    trial.did(f"{layout.name}: {errno.errorcode[number]} in {which} after {after}, {failures} times")

    def tamper(rank: int) -> None:
        BadDisk(run, number, after, failures, which).install(rank)

    ended = trial.train(run, layout, tamper=tamper)
    outcome = judged(run, trial, ended, layout)
    if outcome is Outcome.SURVIVED:
        return outcome
    if 1 not in ended.statuses and 2 not in ended.statuses:
        raise Lost(f"ended with {ended.statuses}: {errors(ended)[0]}")
    if judged(run, trial, trial.train(run, layout), layout) is not Outcome.SURVIVED:
        raise Lost("refused once the disk is well again")
    return Outcome.NAMED


@attack("disks")
def files_may_not_grow(trial: Trial) -> Outcome:
    """The size of a file is limited (ulimit -f), so that a checkpoint or a curve cannot be written."""
    limit = trial.random.choice([200, 1_000, 3_000, 10_000, 100_000, 200_000])
    run = trial.folder / "run"
    trial.did(f"at most {limit} bytes a file")

    def tamper(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = trial.train(run, tamper=tamper)
    outcome = judged(run, trial, ended)
    if outcome is Outcome.SURVIVED:
        return outcome
    if judged(run, trial, trial.train(run)) is not Outcome.SURVIVED:
        raise Lost("refused once files may grow again")
    return Outcome.NAMED


def jumping_clock(seed: str) -> Tamper:
    """time.time jumps at random calls, by seconds or by decades, forth and back."""

    def tamper(rank: int) -> None:
        moments, real, offset = random.Random(f"{seed}:{rank}"), time.time, 0.0

        def jumping() -> float:
            nonlocal offset
            if moments.random() < 0.1:
                offset = moments.choice([0, 3600, -3600, 1e9, -1e9, moments.uniform(-10, 10)])
            return real() + offset

        time.time = jumping

    return tamper


@attack("clocks")
def clock_jumps(trial: Trial) -> Outcome:
    """The clock jumps by seconds or decades in a run that is killed and started again."""
    run = trial.half_done()
    trial.did("time.time jumps")
    ended = trial.train(run, tamper=jumping_clock(trial.name))
    if judged(run, trial, ended) is not Outcome.SURVIVED:
        raise Lost(f"refused: {ended.text[-300:]}")
    return Outcome.SURVIVED


@attack("clocks")
def files_from_the_future(trial: Trial) -> Outcome:
    """All files of a killed run are dated decades from now or ago, as is the time that goodput.json notes."""
    run = trial.half_done()
    when = trial.random.choice([0.0, 4e9, 1e10, -1e9])
    trial.did(f"dated {when:g}")
    goodput = json.loads((run / "goodput.json").read_text())
    (run / "goodput.json").write_text(json.dumps({**goodput, "updated": when}))
    for path in run.rglob("*"):
        os.utime(path, (max(when, 0), max(when, 0)))
    ended = trial.train(run)
    check_ending(ended)
    if judged(run, trial, ended) is not Outcome.SURVIVED:
        raise Lost(f"refused: {ended.text[-300:]}")
    return Outcome.SURVIVED
