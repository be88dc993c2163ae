"""Start one training of a study as a process of its own, and end it when the study must end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel.local_ranks import fork_server
from parallel.processes.lifetime import end_with_starter, terminate, tied

MustEnd = Callable[[], bool]
POLL_S = 0.1
MAIN = Path(__file__).resolve().parents[1] / "main.py"


def launched(launcher: Sequence[str], arguments: list[str], log: Path, must_end: MustEnd) -> int:
    """Train under a launcher to the end, or until `must_end`, when the training saves and stops.

    Args:
        launcher: the command before train/main.py, say ("deepspeed", "--num_gpus", "8").
        arguments: of train/main.py.
        log: file that its output is appended to.
        must_end: asked several times a second.

    Returns:
        The exit status; negative if the training was ended early.
    """
    command = [*launcher, str(MAIN), *arguments]
    with log.open("a", encoding="utf-8") as file:
        process = tied(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            process_group=0,  # Ctrl-C goes to the study alone, which has its trainings save and end
        )
        while process.poll() is None:
            if must_end():
                terminate(process)
                return min(-1, process.wait())
            time.sleep(POLL_S)
        return process.returncode


def forked(arguments: list[str], log: Path, must_end: MustEnd) -> int:
    """Train in a process forked from a server that has everything imported; otherwise as `launched`."""
    os.environ.update(environment())
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that asking for a GPU leaves the server forkable
    process = fork_server("train.study.preload").Process(target=_train, args=(arguments, log))
    process.start()
    while process.is_alive():
        if must_end():
            process.terminate()
            process.join()
            return -1
        process.join(POLL_S)
    return process.exitcode or 0


def _train(arguments: list[str], log: Path) -> None:
    end_with_starter(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the study then has its trainings save and end
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from train.main import main

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the server's number is not inherited
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing of the server's is torn down


def environment() -> dict[str, str]:
    """Return the environment of a training: one thread a process, since several share the cores, unless set."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
