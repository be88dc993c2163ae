"""Run a function on several ranks of this machine, each in its own process.

On a CPU a fork server imports the heavy libraries once, and each rank is forked from it in milliseconds. With GPUs each
rank is spawned, since a process that has used CUDA cannot be forked.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.launch import free_port
from parallel.processes.lifetime import end_with_starter
from parallel.processes.place import forget_launcher

PRELOADED = "parallel.preload"
POLL_INTERVAL_S = 0.05
GRACE_AFTER_FAILURE_S = 5.0
LONGEST_SOCKET_FOLDER = 60
"""Bytes. The name of a socket has at most 107, of which multiprocessing adds up to 40."""
_starting = threading.Lock()


class RankError(AssertionError):
    """A rank failed or did not end in time; the message contains its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    use_gpu: bool = False,
    time_limit_s: float = 300.0,
    context: Any = None,
) -> list[Any]:
    """Run a function on every rank and return the results in the order of ranks.

    Args:
        function: importable by name from the started processes. Its result is passed back with torch.save. RANK,
            WORLD_SIZE, MASTER_PORT and the other variables of a launcher are set when it runs.
        world_size: number of ranks.
        args: of the function.
        use_gpu: whether the ranks use GPUs.
        time_limit_s: until ranks that still run are killed.
        context: of multiprocessing, from `fork_server`; None for that of `PRELOADED`, or for new processes with GPUs.

    Raises:
        RankError: a rank failed, died, or was still running after `time_limit_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(function, world_size, folder, *args, use_gpu=use_gpu, context=context)
        try:
            _wait(processes, time_limit_s)
        finally:
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        return _answers(Path(folder), world_size, hung, [process.exitcode for process in processes])


def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    folder: str,
    *args: Any,
    use_gpu: bool = False,
    context: Any = None,
) -> list[Any]:
    """Start the ranks' processes, which write their results to `folder`, and return them."""
    if context is None:
        context = multiprocessing.get_context("spawn") if use_gpu else fork_server(PRELOADED)
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, args, rank, world_size, port, folder))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def fork_server(preloaded: str) -> Any:
    """Start a server that imports a module once and forks processes, unless it runs, and return its context.

    Its socket lies in the folder of temporary files, or in /tmp if that folder's name is too long for a socket.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preloaded])
    with _starting:
        usual = tempfile.tempdir
        if len(os.fsencode(tempfile.gettempdir())) > LONGEST_SOCKET_FOLDER:
            tempfile.tempdir = "/tmp"
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            tempfile.tempdir = usual
    return context


def _wait(processes: list[Any], time_limit_s: float) -> None:
    """Wait until all ranks have ended; after a failure the others, which may wait for that rank, get a few seconds."""
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
    end_with_starter(signal.SIGKILL)
    torch.set_num_threads(1)
    forget_launcher()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, f"rank {rank}: {traceback.format_exc()}")
    partial = Path(folder, f"{rank}.partial")
    torch.save(result, partial)
    partial.rename(Path(folder, str(rank)))  # so that a result is never read half-written
    if not result[0]:
        os._exit(1)  # skips the collectives of an orderly exit, in which the others might hang
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
