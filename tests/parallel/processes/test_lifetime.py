"""A process ends with the one that started it, and at a second signal wherever it waits."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.local_ranks import RankError, run_ranks, start_ranks

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0
SLEEPS = "import time; print('ready', flush=True); time.sleep(100)"


def until_gone(pid: int) -> None:
    end = time.monotonic() + LIMIT_S
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end, f"process {pid} still runs"
            time.sleep(0.02)


@pytest.fixture
def to_end() -> Iterator[list[int]]:
    """Process ids that a test has met; those still there are killed."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


def test_a_command_that_a_killed_command_started_ends(to_end: list[int]) -> None:
    code = "import subprocess, sys; from parallel.processes.lifetime import tied; "
    code += f"p = tied([sys.executable, '-c', {SLEEPS!r}]); print(p.pid, flush=True); p.wait()"
    parent = start(code)
    assert parent.stdout is not None
    to_end += [parent.pid, int(parent.stdout.readline())]
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    until_gone(to_end[1])


@pytest.mark.parametrize("killed", [[0], [1], [0, 1]])
def test_a_rank_is_asked_once_to_end_with_any_process_of_deepspeeds_launcher(
    tmp_path: Path, to_end: list[int], killed: list[int]
) -> None:
    """DeepSpeed's command starts `python -m deepspeed.launcher.launch`, which starts the ranks."""
    chain = "import subprocess, sys; p = subprocess.Popen(sys.argv[{}:]); print(p.pid, flush=True); p.wait()"
    (tmp_path / "deepspeed/launcher").mkdir(parents=True)
    (tmp_path / "deepspeed/launcher/launch.py").write_text(chain.format(1))
    (tmp_path / "deepspeed/__init__.py").touch()
    (tmp_path / "deepspeed/launcher/__init__.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/deepspeed").write_text(chain.format(1))
    rank = "from parallel.processes.lifetime import end_with_launcher; from train.loop.signals import StopRequest; "
    rank += "import sys, time; stop = StopRequest(); end_with_launcher(); print('ready', flush=True)\n"
    rank += "while not stop.received: time.sleep(0.01)\n"
    rank += "time.sleep(0.5); print(stop.received, flush=True)"
    command = [sys.executable, str(tmp_path / "bin/deepspeed"), sys.executable, "-m", "deepspeed.launcher.launch"]
    top = subprocess.Popen(
        [*command, sys.executable, "-c", rank],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
    )
    assert top.stdout is not None
    pids = [top.pid, int(top.stdout.readline()), int(top.stdout.readline())]
    to_end += pids
    assert top.stdout.readline() == "ready\n"
    for process in killed:
        os.kill(pids[process], signal.SIGKILL)
    assert top.stdout.readline() == "SIGTERM\n", "a second signal would have ended it"
    until_gone(pids[2])


def test_ranks_end_with_the_command_that_started_them(tmp_path: Path, to_end: list[int]) -> None:
    """The fork server between the two outlives the command."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(RankError, match="gave no answer"):
        run_ranks(_leave_ranks_behind, 1, str(folder))
    pids = [int(file.read_text()) for file in sorted(folder.glob("pid_*"))]
    to_end += pids
    assert len(pids) == 2
    for pid in pids:
        until_gone(pid)


def _leave_ranks_behind(folder: str) -> None:
    started = start_ranks(_sleep, 2, folder, folder)
    end = time.monotonic() + LIMIT_S
    while len(list(Path(folder).glob("pid_*"))) < 2:
        assert time.monotonic() < end and all(each.is_alive() for each in started)
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(folder: str) -> None:
    partial = Path(folder, f"partial_{os.environ['RANK']}")
    partial.write_text(str(os.getpid()))
    partial.rename(Path(folder, f"pid_{os.environ['RANK']}"))
    time.sleep(100)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_waits_in_c(
    to_end: list[int], first: signal.Signals, second: signal.Signals
) -> None:
    """A mutex that is taken already stands for a rendezvous in C++: a signal does not interrupt it."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored if the tests run behind &
        "import ctypes; from train.loop.signals import StopRequest; stop = StopRequest(); "
        "lock = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None); "
        "libc.pthread_mutex_lock(lock); print('ready', flush=True); libc.pthread_mutex_lock(lock)"
    )
    process = start(code)
    to_end.append(process.pid)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until it waits
    process.send_signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(second)
    assert process.wait(LIMIT_S) == 128 + second
    assert process.stderr.read() == "a second signal: this process ends at once\n"


def test_a_childs_signals_are_not_its_parents(to_end: list[int]) -> None:
    code = (
        "import os, signal, time, warnings; from train.loop.signals import StopRequest\n"
        "warnings.simplefilter('ignore'); stop = StopRequest(); pids = []\n"
        "for _ in range(3):\n"
        "    if (pid := os.fork()) == 0:\n"
        "        time.sleep(100)\n"
        "    pids.append(pid)\n"
        "for number in (signal.SIGTERM, signal.SIGKILL):\n"
        "    time.sleep(0.3)\n"
        "    [os.kill(pid, number) for pid in pids]\n"
        "[os.waitpid(pid, 0) for pid in pids]\n"
        "time.sleep(0.5); print(stop.received); stop.close()"
    )
    process = start(code)
    to_end.append(process.pid)
    said, errors = process.communicate(timeout=LIMIT_S)
    assert (said, errors, process.returncode) == ("None\n", "", 0)
