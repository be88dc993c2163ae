"""Starting a process: which accelerator, which backend, which rank.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as DeepSpeed's launcher,
torchrun and the Slurm scripts set them; without them the process is a world of one.
"""

import contextlib
import os
import random
import socket
import warnings
from datetime import timedelta

import torch

from data.errors import DataError, first_line

PORTS = (15_000, 32_000)


class LaunchError(RuntimeError):
    """The processes cannot find each other; one clear line."""


def choose_accelerator() -> None:
    """Tells DeepSpeed which accelerator to use; call before anything imports deepspeed.

    DS_ACCELERATOR=cpu in the environment chooses the CPU on a machine with GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # lets communication start before the products behind it


def world_size() -> int:
    return _launched_with("WORLD_SIZE", "1")


def rank() -> int:
    return _launched_with("RANK", "0")


def _launched_with(name: str, default: str) -> int:
    """A number that the launcher has set in the environment; raises DataError where it is none."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise DataError(f"{name} = {text!r} in the environment: expected a whole number; unset it or mend the launcher")
    return int(text)


def local_device() -> torch.device:
    """This process's device; CUDA devices are taken by local rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _launched_with("LOCAL_RANK", "0"))


def initialize_distributed(timeout_s: float = 600.0) -> None:
    """Joins the process group: NCCL with GPUs, gloo without; a process that has joined stays as it is.

    Raises:
        LaunchError: no port is free, or the other ranks do not answer.
    """
    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        cause = first_line(error)
        raise LaunchError(
            f"rank {rank()} of {world_size()} cannot join the others at {address} ({cause}); if the port is taken, "
            f"choose "
            "another with deepspeed --master_port"
        ) from None
    _join_deepspeed()


def _join_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    # Else the CPU backend compiles a shared-memory operator at start (50 s) and leaves its segments behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def free_port() -> int:
    """A port that nothing listens on, below the range from which systems give ports to connections: one of those may be
    taken again before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
