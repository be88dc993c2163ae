"""Which rank this process is: the one reader of the variables that a launcher sets.

DeepSpeed's launcher, torchrun and the Slurm scripts set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Without the first three, the process is a world of one.
"""

import ipaddress
import os
from dataclasses import dataclass

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to "True" by torchrun: its agent hosts the store at MASTER_ADDR and MASTER_PORT."""
LOCAL_SIZE = "LOCAL_SIZE"
"""How many ranks DeepSpeed's launcher has started on this machine."""
MOST = 10**9


class LaunchError(RuntimeError):
    """The processes cannot find each other; the message is one line."""


class EnvironmentValueError(LaunchError):
    """The environment does not say which rank this process is; the message is one line."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks of its world.

    Attributes:
        rank: from 0 to world_size - 1.
        world_size: number of ranks.
        local_rank: number of the rank on its machine, from 0.
        address: name or address of rank 0's machine; empty for a world of one.
        port: there; 0 for a world of one.
        agent_hosts_store: whether torchrun's agent listens at that port, instead of rank 0.
        shares_launcher: whether one process has started all ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    agent_hosts_store: bool = False
    shares_launcher: bool = False

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks are known to be on this machine."""
        return self.world_size == 1 or self.shares_launcher or _is_loopback(self.address)


def place() -> Place:
    """Read this process's place from the environment.

    Raises:
        EnvironmentValueError: only some of the variables are set, or one of them is out of bounds.
    """
    if not is_launched():
        return Place()
    _require(NUMBERS)
    world_size = _number("WORLD_SIZE", 1, MOST)
    rank, local_rank = (_number(name, 0, world_size - 1, " (WORLD_SIZE - 1)") for name in ("RANK", "LOCAL_RANK"))
    if world_size == 1:
        return Place()
    _require(ADDRESS)
    return Place(
        rank,
        world_size,
        local_rank,
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 1, 65_535),
        agent_hosts_store=os.environ.get(AGENT_STORE) == "True",
        shares_launcher=os.environ.get(LOCAL_SIZE) == os.environ["WORLD_SIZE"] and AGENT_STORE not in os.environ,
    )


def is_launched() -> bool:
    """Return whether a launcher has given this process a rank."""
    return any(name in os.environ for name in NUMBERS)


def forget_launcher() -> None:
    """Make this process a world of one, and those that it starts; whatever launcher started it.

    Commands of one process call this first: in a job's shell they inherit the variables of a rank, and would wait for
    the others.
    """
    for name in (*NUMBERS, *ADDRESS, AGENT_STORE, LOCAL_SIZE):
        os.environ.pop(name, None)


def _require(names: tuple[str, ...]) -> None:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]!r}" for name in (*NUMBERS, *ADDRESS) if os.environ.get(name))
        raise EnvironmentValueError(
            f"the environment has {given or 'an empty ' + missing[0]}, but not {', '.join(missing)}: start the ranks "
            f"with a launcher (deepspeed, torchrun), or unset {', '.join(NUMBERS)} to train with one process"
        )


def _number(name: str, least: int, most: int, of: str = "") -> int:
    text = os.environ[name]
    if text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most:
        return int(text)
    raise EnvironmentValueError(
        f"{name} = {text!r} in the environment: expected a whole number from {least} to {most}{of}; unset it or fix "
        "the launcher"
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
