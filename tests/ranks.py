"""Runs a function on several gloo ranks, each a process of its own.

A fork server imports the heavy libraries once; every rank is forked from it in milliseconds.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 300


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`, each with the distributed environment set.

    Raises:
        AssertionError: a rank failed or did not end in time; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            context.Process(target=_rank_main, args=(function, args, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIME_LIMIT_S)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        results = [
            pickle.loads(path.read_bytes()) for rank in range(world_size) if (path := Path(folder, str(rank))).exists()
        ]
        errors = [text for ok, text in results if not ok]
        assert not errors, "\n".join(errors)
        assert not hung and len(results) == world_size, f"ranks {hung} hung; {len(results)} of {world_size} answered"
        return [value for _, value in results]


def _rank_main(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, folder: str
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, f"rank {rank}: {traceback.format_exc()}")
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
