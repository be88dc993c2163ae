"""Starts runs of train/main.py on the devices of this machine, several at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from parallel.launch import free_port

POLL_INTERVAL_S = 0.2
MAIN = Path(__file__).resolve().parents[1] / "main.py"


@dataclass
class Job:
    """A run of train/main.py with its place on the machine."""

    name: str
    processes: int
    arguments: list[str]
    log: Path
    devices: list[int] = field(default_factory=list)
    seconds: float = 0.0
    status: int | None = None

    @property
    def last_words(self) -> str:
        """The last error of its log, or its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["nothing was printed"])[-1]


def run_all(jobs: list[Job], devices: int, at_once: int, time_limit_s: float) -> Iterator[Job]:
    """Runs jobs in order and yields each as it ends.

    Args:
        devices: of this machine; on a machine without GPUs, processes that may run at a time.
        at_once: jobs that may share a device.
    """
    waiting, running = list(jobs), list[tuple[Job, subprocess.Popen[bytes], float]]()
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
            late = time.monotonic() - began > time_limit_s
            if process.poll() is None and not late:
                continue
            if late:
                process.kill()
            running.remove(entry)
            for device in job.devices:
                load[device] -= 1
            job.status, job.seconds = process.wait(), time.monotonic() - began
            yield job
        time.sleep(POLL_INTERVAL_S)


def _least_loaded(load: list[int], count: int, at_once: int) -> list[int] | None:
    """The `count` devices with the fewest jobs, None where that many cannot take another."""
    chosen = sorted(sorted(range(len(load)), key=lambda device: load[device])[:count])
    return chosen if len(chosen) == count and all(load[device] < at_once for device in chosen) else None


def _start(job: Job) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.devices))
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={job.processes}"]
    command = [*launcher, f"--master-port={free_port()}", str(MAIN), *job.arguments]
    with job.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
