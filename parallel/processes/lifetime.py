"""How long a process lives: no longer than the one that started it, and not beyond a second signal.

Neither waits for the main thread to return to Python: it may be in a collective whose other side is gone.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # else the parent would count a child's signals


def end_with_parent(number: int, parent: int) -> None:
    """Have the kernel send this process a signal when the parent thread ends, or its process, however it ends.

    Args:
        number: of the signal.
        parent: the parent's process id. If it has ended already, the signal is sent at once.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Have this rank receive SIGTERM, on which it saves and stops, when its launcher ends, however it ends.

    DeepSpeed's command starts a second process, which starts the ranks and outlives the first; so both are watched.
    """
    launcher = os.getppid()
    try:
        watched = [os.pidfd_open(launcher)]
    except OSError:  # the kernel is older than 5.3; its own signal comes twice if the launcher has several threads
        end_with_parent(signal.SIGTERM, launcher)
        return
    with contextlib.suppress(OSError):  # it has just ended
        command = _parent_of(launcher)
        if _is_node_launcher(launcher) and _is_deepspeed_command(command):
            watched.append(os.pidfd_open(command))
    _end_with(watched, signal.SIGTERM)


def end_with_starter(number: int) -> None:
    """Send this process a signal when the process that started it through `multiprocessing` ends, however it ends.

    A fork server stands between the two, and lives as long as one of the processes that it forked.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None, "started by multiprocessing"
    _end_with([starter.sentinel], number)


def _end_with(processes: list[int], number: int) -> None:
    """Send this process a signal, once, when one of other processes ends, of which files are given that tell this."""
    poll = select.poll()
    for file in processes:
        poll.register(file, select.POLLIN)

    def follow() -> None:
        poll.poll()
        os.kill(os.getpid(), number)

    threading.Thread(target=follow, name="ends with another process", daemon=True).start()


def tied(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a command that receives SIGTERM when the thread that called this ends, or its process, however it ends."""
    parent = os.getpid()
    return subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGTERM, parent), **options)


def terminate(launcher: "subprocess.Popen[bytes]") -> None:
    """Ask a launcher to end its ranks, which save and stop. DeepSpeed's command does not pass signals on."""
    with contextlib.suppress(OSError):
        if _is_deepspeed_command(launcher.pid):
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            for child in filter(_is_node_launcher, map(int, children)):
                os.kill(child, signal.SIGTERM)
                return
    launcher.terminate()


def _is_deepspeed_command(pid: int) -> bool:
    words = _command_line(pid)[:4]
    return "deepspeed.launcher.runner" in words or any(Path(word).name == "deepspeed" for word in words)


def _is_node_launcher(pid: int) -> bool:
    return "deepspeed.launcher.launch" in _command_line(pid)[:5]


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


class SignalWatch:
    """Handle signals, and end the process with status 128 + signal at the second one, whatever the main thread does.

    Python runs signal handlers in the main thread, and only between two of its own instructions. So the second signal
    is seen by a thread, to which the interpreter's C handler writes the number of each signal.

    Args:
        handlers: by the signal's number. Ctrl-C counts too, whether it has a handler here or not.
    """

    def __init__(self, handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
        self._numbers = {*handlers, signal.SIGINT}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the thread
        self._thread.join()

    def _watch(self) -> None:
        received = 0
        while number := os.read(self._read, 1):
            if number[0] in self._numbers:
                received += 1
                if received == 2:
                    with contextlib.suppress(OSError):
                        os.write(2, b"a second signal: this process ends at once\n")
                    os._exit(128 + number[0])
        os.close(self._read)
