"""Starts runs of train/main.py on the devices of this machine, several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from parallel.launch import free_port
from parallel.processes.lifetime import tied

POLL_INTERVAL_S = 0.2
END_WITHIN_S = 60.0
"""Time for a launcher to end its processes. It kills those that do not end within 30 s."""
MAIN = Path(__file__).resolve().parents[1] / "main.py"


@dataclass
class Job:
    """A run of train/main.py and the devices it is given."""

    name: str
    processes: int
    arguments: list[str]
    log: Path
    devices: list[int] = field(default_factory=list)
    seconds: float = 0.0
    status: int | None = None
    is_late: bool = False

    @property
    def last_words(self) -> str:
        """Return why the run failed: that it was still running, the last error in its log, or the log's last line."""
        if self.is_late:
            return f"still running after {self.seconds:.0f} s; see {self.log}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["nothing was printed"])[-1]


Running = tuple[Job, subprocess.Popen[bytes], float]
"""A started job, its launcher, and its start time."""


def run_all(jobs: list[Job], devices: int, at_once: int, time_limit_s: float) -> Iterator[Job]:
    """Start jobs in order, and yield each as it ends.

    Args:
        devices: GPUs of this machine; without GPUs, the number of processes that may run at a time.
        at_once: jobs that may share a device.
    """
    running: list[Running] = []
    try:
        yield from _run_all(list(jobs), running, devices, at_once, time_limit_s)
    finally:
        for _, process, _ in running:
            _end(process)


def _run_all(
    waiting: list[Job], running: list[Running], devices: int, at_once: int, time_limit_s: float
) -> Iterator[Job]:
    load = [0] * devices
    while waiting or running:
        while waiting and (free := _least_loaded(load, waiting[0].processes, at_once)) is not None:
            job = waiting.pop(0)
            job.devices = free
            for device in free:
                load[device] += 1
            running.append((job, _start(job), time.monotonic()))
        for entry in list(running):
            job, process, began = entry
            job.seconds = time.monotonic() - began
            if process.poll() is None:
                if job.seconds <= time_limit_s:
                    continue
                job.is_late = True
                _end(process)
            running.remove(entry)
            for device in job.devices:
                load[device] -= 1
            job.status = -signal.SIGTERM if job.is_late else process.returncode  # whatever a late run says of itself
            yield job
        time.sleep(POLL_INTERVAL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher with SIGTERM. If it were killed, its processes would keep the devices."""
    process.terminate()
    try:
        process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _least_loaded(load: list[int], count: int, at_once: int) -> list[int] | None:
    """Return the `count` devices with the fewest jobs; None if fewer than that can take another."""
    chosen = sorted(sorted(range(len(load)), key=lambda device: load[device])[:count])
    return chosen if len(chosen) == count and all(load[device] < at_once for device in chosen) else None


def _start(job: Job) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.devices))
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={job.processes}"]
    command = [*launcher, f"--master-port={free_port()}", str(MAIN), *job.arguments]
    with job.log.open("wb") as log:
        return tied(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
