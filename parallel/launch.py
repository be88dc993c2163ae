"""Start of a process: which accelerator, which device, which process group.

Which rank it is: `parallel.processes.place`. Where the ranks meet: `parallel.processes.meeting`.
"""

import contextlib
import os
import random
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store

from parallel.deepspeed_internals import leave_out_shared_memory
from parallel.processes.meeting import cannot_join, open_store
from parallel.processes.place import EnvironmentValueError, LaunchError, place

__all__ = ["EnvironmentValueError", "LaunchError"]

PORTS = (15_000, 32_000)
LOOPBACK_INTERFACE = "lo"
_met: list[Store] = []  # the store of `meet`, until the process group takes it over


def choose_accelerator() -> None:
    """Set the environment variables that choose the accelerator; call before anything imports deepspeed.

    DS_ACCELERATOR=cpu chooses the CPU on a machine with GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # communication starts before products queued later


@contextlib.contextmanager
def warm_device() -> Iterator[None]:
    """Create this rank's CUDA context on a thread while the context lasts, which imports libraries; none on a CPU.

    Errors are left to the first real use of the device.
    """

    def create() -> None:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=local_device())

    if not torch.cuda.is_available():
        yield
        return
    thread = threading.Thread(target=create, name="warm device", daemon=True)
    thread.start()
    yield
    thread.join()


def world_size() -> int:
    """Return the number of processes."""
    return place().world_size


def rank() -> int:
    """Return this process's global rank."""
    return place().rank


def local_device() -> torch.device:
    """Return this process's device: the CUDA device of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place().local_rank)


def meet(timeout_s: float) -> Store:
    """Connect to the store through which the ranks find each other; touches no device.

    `initialize_distributed` uses the same store.

    Args:
        timeout_s: until an operation on the store fails.

    Raises:
        LaunchError: the store cannot be hosted, or does not answer within `timeout_s`.
    """
    store = open_store(place(), timeout_s)
    _met[:] = [store]
    return store


def initialize_distributed(timeout_s: float = 600.0) -> None:
    """Join the process group, NCCL with GPUs and gloo without; does nothing if this process has joined already.

    Args:
        timeout_s: of every collective.

    Raises:
        LaunchError: no port is free, or the other ranks do not answer.
    """
    if torch.distributed.is_initialized():
        return
    here = place()
    if here.world_size == 1:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed reads them
    if here.is_on_one_machine:
        _listen_to_this_machine()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, timeout = _met.pop() if _met else open_store(here, timeout_s), timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            store=PrefixStore("default_pg", store),
            rank=here.rank,
            world_size=here.world_size,
        )
    except (RuntimeError, ValueError) as error:
        raise cannot_join(here, error) from None
    _join_deepspeed()


def _listen_to_this_machine() -> None:
    """Have gloo and NCCL listen on the loopback interface only, unless the user has named another."""
    if any(name == LOOPBACK_INTERFACE for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, LOOPBACK_INTERFACE)


def _join_deepspeed() -> None:
    import deepspeed

    leave_out_shared_memory()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def free_port() -> int:
    """Return a port that nothing listens on.

    It lies below the range from which systems assign ports to connections, since one of those may be taken before it is
    used.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
