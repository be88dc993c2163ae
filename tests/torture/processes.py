"""Commands of the project as child processes, forked from one process that has the heavy libraries loaded.

A fork costs milliseconds; a start from nothing costs ten seconds. Each child runs the command's own entry point with
its own folder, environment, output file and process group, so that it ends as a process of its own would.
"""

import contextlib
import ctypes
import faulthandler
import os
import resource
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
POLL_INTERVAL_S = 0.01
MAX_MEMORY_BYTES = 6 << 30
"""For each process. DeepSpeed reserves some, and what reads an endless file meets a MemoryError."""
PR_SET_PDEATHSIG = 1
Tamper = Callable[[int], None]
"""Called in a child, with its rank, before the command starts."""


def load_libraries() -> None:
    """Load what every training needs. Nothing is computed here, so that no thread is lost at a fork."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import train.evaluate
    import train.figures
    import train.loop.trainer  # noqa: F401


@dataclass(frozen=True)
class Ended:
    """How the ranks of a command ended.

    Attributes:
        statuses: of each rank; negative for a signal, None for one that had to be killed after the time limit.
        outputs: what each rank printed.
    """

    statuses: list[int | None]
    outputs: list[str]

    @property
    def text(self) -> str:
        return "".join(self.outputs)

    @property
    def hung(self) -> bool:
        return None in self.statuses


class Ranks:
    """The running processes of one command."""

    def __init__(self, pids: list[int], outputs: list[Path]) -> None:
        self.pids, self._outputs = pids, outputs
        self._statuses: dict[int, int] = {}

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank that still runs."""
        if rank in self._running():
            os.kill(self.pids[rank], number)

    def output(self, rank: int = 0) -> str:
        return self._outputs[rank].read_text(errors="replace")

    def is_running(self) -> bool:
        return bool(self._running())

    def until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Wait until something is so, a rank has ended, or the time is up."""
        end = time.monotonic() + limit_s
        while len(self._running()) == len(self.pids) and time.monotonic() < end and not condition():
            time.sleep(POLL_INTERVAL_S)

    def wait(self, limit_s: float, after_first_s: float | None = None) -> Ended:
        """Wait for all ranks; kill those that still run.

        Args:
            limit_s: after which a rank counts as hung.
            after_first_s: once a rank was killed or failed, the others are killed so many seconds later, as a launcher
                does, and do not count as hung. None leaves them alone.
        """
        end, launcher = time.monotonic() + limit_s, False
        while (running := self._running()) and time.monotonic() < end:
            if after_first_s is not None and not launcher and any(self._statuses.values()):
                launcher, end = True, min(end, time.monotonic() + after_first_s)
            time.sleep(POLL_INTERVAL_S)
        for rank in running:
            with contextlib.suppress(ProcessLookupError):
                if not launcher:
                    os.kill(self.pids[rank], signal.SIGABRT)  # prints where it hangs
                    time.sleep(0.5)
                os.killpg(self.pids[rank], signal.SIGKILL)
        while still := self._running():
            time.sleep(POLL_INTERVAL_S if still else 0)
        hung = set() if launcher else set(running)
        statuses = [None if rank in hung else self._statuses[rank] for rank in range(len(self.pids))]
        return Ended(statuses, [self.output(rank) for rank in range(len(self.pids))])

    def _running(self) -> list[int]:
        for rank, pid in enumerate(self.pids):
            if rank not in self._statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self._statuses]


def start(
    command: list[str],
    folder: Path,
    world_size: int = 1,
    environment: dict[str, str | None] | None = None,
    cwd: Path | None = None,
    tamper: Tamper | None = None,
) -> Ranks:
    """Start the ranks of a command.

    Args:
        command: a module, say "train.main", and its arguments.
        folder: where the outputs are kept.
        world_size: number of ranks; a single one is started without a launcher's variables.
        environment: variables to set; None takes one away.
        cwd: working directory; `folder` by default.
        tamper: called in each child before the command.
    """
    number = len(list(folder.glob("output-*")))
    outputs = [folder / f"output-{number:02d}-{command[0]}.{rank}" for rank in range(world_size)]
    variables: dict[str, str | None] = {"PYTHONFAULTHANDLER": "1", **(environment or {})}
    if world_size > 1:
        from parallel.launch import free_port

        port = str(free_port())
        variables = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    pids = []
    for rank, output in enumerate(outputs):
        output.touch()
        if pid := os.fork():
            pids.append(pid)
            continue
        if world_size > 1:
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **variables}
        _child(command, rank, output, variables, cwd or folder, tamper)
    return Ranks(pids, outputs)


def _child(
    command: list[str], rank: int, output: Path, variables: dict[str, str | None], cwd: Path, tamper: Tamper | None
) -> NoReturn:
    """Be the process of a command; never return."""
    status: int = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an interrupted torture leaves nothing behind
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        faulthandler.enable(file=2)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        os.chdir(cwd)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        if tamper is not None:
            tamper(rank)
        status = _run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _run(command: list[str]) -> int:
    module, *arguments = command
    try:
        if module == "train.main":
            sys.argv = [str(ROOT / "train/main.py"), *arguments]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = [module, *arguments]
            warnings.filterwarnings("ignore", module="runpy")  # the module is loaded already; it runs anew all the same
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    _end_of_interpreter()
    return 0


def _end_of_interpreter() -> None:
    """Do what Python does at its end, as far as a command may rely on it: wait for threads, call atexit functions."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
