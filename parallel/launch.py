"""Start of a process: which accelerator, which backend, which rank.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), where DeepSpeed's launcher,
torchrun and the Slurm scripts set them. Without these variables the process is a world of one.
"""

import contextlib
import os
import random
import secrets
import socket
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from parallel.deepspeed_internals import leave_out_shared_memory

PORTS = (15_000, 32_000)
POLL_INTERVAL_S = 0.05
_met: list[Store] = []  # the store of `meet`, until the process group takes it over


class LaunchError(RuntimeError):
    """The processes cannot find each other; the message is one line."""


class EnvironmentValueError(LaunchError):
    """The launcher has set an environment variable to something that is not a number."""


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


def world_size() -> int:
    """Return the number of processes."""
    return _launched_with("WORLD_SIZE", "1")


def rank() -> int:
    """Return this process's global rank."""
    return _launched_with("RANK", "0")


def _launched_with(name: str, default: str) -> int:
    """Return a number that the launcher sets in the environment; raise EnvironmentValueError if it is none."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise EnvironmentValueError(
            f"{name} = {text!r} in the environment: expected a whole number; unset it or fix the launcher"
        )
    return int(text)


def local_device() -> torch.device:
    """Return this process's device: the CUDA device of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _launched_with("LOCAL_RANK", "0"))


def meet(timeout_s: float) -> Store:
    """Connect to the store through which the ranks find each other; touches no device.

    `initialize_distributed` uses the same store. Torchrun's agent hosts it and keeps it for ranks that it restarts, so
    under torchrun the keys of each start get their own prefix. Under other launchers rank 0 hosts it. Unlike torch's
    own rendezvous, rank 0 does not wait for the others here, so that the caller can name the ranks that are missing.

    Args:
        timeout_s: until an operation on the store fails.

    Raises:
        LaunchError: the store cannot be hosted, or does not answer within `timeout_s`.
    """
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size(),
            is_master=rank() == 0 and not is_hosted,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=not is_hosted,
        )
        if is_hosted:
            store = _of_this_start(store, rank(), world_size(), timeout_s)
    except (KeyError, RuntimeError, ValueError) as error:
        raise _cannot_join(error) from None
    _met[:] = [store]
    return store


def _of_this_start(store: Store, here: int, world_size: int, limit_s: float) -> Store:
    """Return the store under a prefix that no earlier start has used.

    Each rank sends rank 0 a new random token and receives the prefix under that token. So nothing that an earlier start
    left can be mistaken for either. Rank 0 waits at most `limit_s` seconds for the others; its caller then names those
    that are missing.
    """
    if here != 0:
        name = secrets.token_hex(8)
        store.set(f"token/{here}", name)
        own = PrefixStore(store.get(f"prefix/{name}").decode(), store)
        own.set(f"here/{here}", "")
        return own
    prefix, ends_at = secrets.token_hex(8), time.monotonic() + limit_s
    own, missing, known = PrefixStore(prefix, store), list(range(1, world_size)), dict[int, bytes]()
    while missing and time.monotonic() < ends_at:
        for rank in missing:
            if store.check([f"token/{rank}"]) and known.get(rank) != (token := store.get(f"token/{rank}")):
                store.set(f"prefix/{token.decode()}", prefix)
                known[rank] = token
        time.sleep(POLL_INTERVAL_S)
        missing = [rank for rank in missing if not own.check([f"here/{rank}"])]
    return own


def initialize_distributed(timeout_s: float = 600.0) -> None:
    """Join the process group, NCCL with GPUs and gloo without; does nothing if this process has joined already.

    Args:
        timeout_s: of every collective.

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
    timeout = timedelta(seconds=timeout_s)
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timeout, **_place(timeout)
        )
    except (RuntimeError, ValueError) as error:
        raise _cannot_join(error) from None
    _join_deepspeed()


def _place(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments with which the process group uses the store of `meet`; none if `meet` was not called."""
    if not _met:
        return {}
    store = _met.pop()
    store.set_timeout(timeout)
    return {
        "store": PrefixStore("default_pg", store),
        "rank": rank(),
        "world_size": world_size(),
    }


def _cannot_join(error: Exception) -> LaunchError:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return LaunchError(
        f"rank {rank()} of {world_size()} cannot join the others at {address} ({first_line}); if the port is "
        "taken, choose another with deepspeed --master_port"
    )


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
