"""Runs a function on several ranks of this machine, each a process of its own.

On a CPU a fork server imports the heavy libraries once and every rank is forked from it in milliseconds. With GPUs each
rank is spawned afresh, since a process that has touched CUDA cannot be forked.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.launch import free_port

PRELOADED = "parallel.preload"
POLL_INTERVAL_S = 0.05
GRACE_AFTER_FAILURE_S = 5.0


class RankError(AssertionError):
    """A rank failed or did not end in time; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, use_gpu: bool = False, time_limit_s: float = 300.0
) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`, each with RANK, WORLD_SIZE, MASTER_PORT and the like set.

    Args:
        function: importable by name from the started processes; what it returns is saved with torch.save.

    Raises:
        RankError: a rank failed, died, or was still running after `time_limit_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(function, world_size, folder, *args, use_gpu=use_gpu)
        try:
            _wait(processes, time_limit_s)
        finally:
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        return _answers(Path(folder), world_size, hung, [process.exitcode for process in processes])


def start_ranks(
    function: Callable[..., Any], world_size: int, folder: str, *args: Any, use_gpu: bool = False
) -> list[Any]:
    """The started processes of the ranks, which leave their answers in `folder`."""
    context: Any = multiprocessing.get_context("spawn" if use_gpu else "forkserver")
    if not use_gpu:
        context.set_forkserver_preload([PRELOADED])
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, args, rank, world_size, port, folder))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _wait(processes: list[Any], time_limit_s: float) -> None:
    """Until all ranks have ended; a rank that failed leaves the others waiting for it, so they get a little longer."""
    end = time.monotonic() + time_limit_s
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE_AFTER_FAILURE_S)
        time.sleep(POLL_INTERVAL_S)


def _answers(folder: Path, world_size: int, hung: list[int], exit_codes: list[int | None]) -> list[Any]:
    found = {
        rank: torch.load(path, weights_only=False)
        for rank in range(world_size)
        if (path := folder / str(rank)).exists()
    }
    errors = [text for ok, text in found.values() if not ok]
    if errors:
        raise RankError("\n".join(errors))
    if len(found) < world_size:
        missing = [rank for rank in range(world_size) if rank not in found]
        raise RankError(
            f"ranks {missing} of {world_size} gave no answer; still running at the time limit: {hung}; exit codes: "
            f"{[exit_codes[rank] for rank in missing]}"
        )
    return [found[rank][1] for rank in range(world_size)]


def _rank_main(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, folder: str
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, f"rank {rank}: {traceback.format_exc()}")
    partial = Path(folder, f"{rank}.partial")
    torch.save(result, partial)
    partial.rename(Path(folder, str(rank)))  # an answer is there whole or not at all
    if not result[0]:
        os._exit(1)  # without the collectives of an orderly end, in which the others might hang
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
