"""Where the ranks find each other: one store, which listens only where ranks of this run can be.

| the ranks                                | the store                                                             |
|------------------------------------------|-----------------------------------------------------------------------|
| one process                              | in its memory; nothing listens                                        |
| on one machine, one launcher (DeepSpeed) | hosted by rank 0 at 127.0.0.1 and a free port, whatever MASTER_PORT   |
| on one machine, MASTER_ADDR=127.0.0.1    | hosted by rank 0 at 127.0.0.1 and MASTER_PORT                         |
| on several machines                      | hosted by rank 0 at MASTER_ADDR, on that one interface of its machine |
| under torchrun                           | hosted by torchrun's agent                                            |

Ranks of one launcher learn the free port through a socket whose name has the launcher's process id and start time. It
lies in Linux's abstract namespace, so it needs no folder and leaves no file. Both ends check that the other belongs to
the same user.
"""

import contextlib
import errno
import os
import secrets
import socket
import struct
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from parallel.processes.place import LaunchError, Place

LOOPBACK = "127.0.0.1"
BACKLOG = 16_384
POLL_INTERVAL_S = 0.05


def open_store(here: Place, limit_s: float) -> Store:
    """Host the store of the ranks, or connect to it; touches no device.

    Unlike torch's own rendezvous, rank 0 does not wait for the others here, so that the caller can name those that are
    missing. Torchrun's agent keeps its store for ranks that it restarts, so there the keys of each start get their own
    prefix.

    Args:
        here: this process's place.
        limit_s: seconds until an operation on the store fails.

    Raises:
        LaunchError: the store cannot be hosted, or does not answer within `limit_s`.
    """
    if here.world_size == 1:
        return HashStore()
    timeout = timedelta(seconds=limit_s)
    try:
        if here.agent_hosts_store:
            return _of_this_start(_connect(here.address, here.port, here, timeout), here, limit_s)
        host = LOOPBACK if here.is_on_one_machine else here.address
        meeting_point = _meeting_point() if here.shares_launcher else None
        if here.rank == 0:
            listener = listen(host, 0 if meeting_point else here.port)
            address, port = listener.getsockname()[:2]
            store = TCPStore(
                address if address not in ("::", "0.0.0.0") else host,
                port,
                here.world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            if meeting_point:
                _tell_port(meeting_point, port, here.world_size - 1)
            return store
        port = _ask_port(meeting_point, limit_s) if meeting_point else here.port
        return _connect(host, port, here, timeout)
    except (OSError, RuntimeError, ValueError) as error:
        raise cannot_join(here, error) from None


def cannot_join(here: Place, error: Exception) -> LaunchError:
    """Describe in one line why this rank does not reach the others."""
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    who = f"rank {here.rank} of {here.world_size} cannot join the others"
    if here.shares_launcher:
        return LaunchError(f"{who} on this machine ({reason})")
    return LaunchError(
        f"{who} at {here.address}:{here.port} ({reason}); if the port is taken, choose another with deepspeed "
        "--master_port or MASTER_PORT"
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a TCP socket that listens on one interface of this machine.

    Listens on all interfaces, with a warning, if the host's name leads to none of them that others can reach.

    Args:
        host: address or name of an interface of this machine.
        port: there; 0 for a free one.

    Raises:
        OSError: the name is unknown, or the port is taken.
    """
    found = [each[4] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    reachable = [where for where in found if host == LOOPBACK or not str(where[0]).startswith(("127.", "::1"))]
    for where in reachable:
        # the address of another machine (a NAT's, say) cannot be bound
        with contextlib.suppress(_NotOursError):
            return _bound(where)
    print(
        f"warning: MASTER_ADDR={host} leads to no interface of rank 0's machine ({', '.join(str(w[0]) for w in found)}"
        "): the store through which the ranks meet listens on all of them; set MASTER_ADDR to the address of one",
        file=sys.stderr,
    )
    return _bound(("::", port, 0, 0) if socket.has_dualstack_ipv6() else ("0.0.0.0", port))


class _NotOursError(Exception):
    """No interface of this machine has the address."""


def _bound(where: tuple) -> socket.socket:  # type: ignore[type-arg]
    is_v6 = len(where) == 4
    listener = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_v6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != "::")
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise _NotOursError from None
        raise
    return listener


def _connect(host: str, port: int, here: Place, timeout: timedelta) -> Store:
    _wait_for_listener(host, port, timeout.total_seconds())
    return TCPStore(host, port, here.world_size, is_master=False, timeout=timeout, wait_for_workers=False)


def _wait_for_listener(host: str, port: int, limit_s: float) -> None:
    """Wait until the store listens. torch would wait as well, and print its C++ stack when a signal arrives."""
    ends_at = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((host, port), max(ends_at - time.monotonic(), POLL_INTERVAL_S)).close()
            return
        except OSError:
            if time.monotonic() > ends_at:
                raise
        time.sleep(POLL_INTERVAL_S)


def _meeting_point() -> str:
    """Name the socket at which rank 0 tells the port: no other launcher on this machine has the same name."""
    launcher = os.getppid()
    with open(f"/proc/{launcher}/stat", "rb") as file:
        start_ticks = file.read().rpartition(b")")[2].split()[19].decode()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"\0entropy-guided-transformer/{os.getuid()}/{namespace}/{launcher}/{start_ticks}"


def _tell_port(meeting_point: str, port: int, ranks: int) -> None:
    """Answer each of the other ranks once with the store's port, on a thread."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(meeting_point)
    server.listen(BACKLOG)

    def serve() -> None:
        left = ranks
        with server:
            while left:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        if _user_at(connection) == os.getuid():
                            connection.sendall(str(port).encode())
                            left -= 1

    threading.Thread(target=serve, name="meeting point", daemon=True).start()


def _ask_port(meeting_point: str, limit_s: float) -> int:
    """Return the port of rank 0's store, once rank 0 tells it."""
    ends_at = time.monotonic() + limit_s
    while time.monotonic() < ends_at:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(max(ends_at - time.monotonic(), POLL_INTERVAL_S))
            connection.connect(meeting_point)
            if (user := _user_at(connection)) != os.getuid():
                raise RuntimeError(f"user {user} listens where rank 0 should; end that process and start again")
            if text := connection.recv(16):
                return int(text)
        time.sleep(POLL_INTERVAL_S)
    raise TimeoutError(f"rank 0 has not opened the store within {limit_s:g} seconds")


def _user_at(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


def _of_this_start(store: Store, place: Place, limit_s: float) -> Store:
    """Return the store under a prefix that no earlier start has used.

    Each rank sends rank 0 a new random token and receives the prefix under that token. So nothing that an earlier start
    left can be mistaken for either. Rank 0 waits at most `limit_s` seconds for the others; its caller then names those
    that are missing.
    """
    here, world_size = place.rank, place.world_size
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
