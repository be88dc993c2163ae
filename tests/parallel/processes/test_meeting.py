"""The ranks meet where only they can be: what listens, and on which interface."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from parallel.launch import free_port
from parallel.local_ranks import run_ranks
from parallel.processes import meeting
from parallel.processes.meeting import listen, open_store
from parallel.processes.place import LaunchError, Place


def listening() -> set[str]:
    """Return the addresses at which this process listens for TCP connections, in hexadecimal, without ports."""
    links = [os.readlink(f"/proc/self/fd/{fd.name}") for fd in os.scandir("/proc/self/fd") if fd.is_symlink()]
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


LOOPBACK = "0100007F"


def test_one_process_has_no_store_to_connect_to() -> None:
    assert isinstance(open_store(Place(), 1.0), HashStore)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_of_one_machine_listen_to_it_alone(world_size: int) -> None:
    for found, interfaces in run_ranks(_listening_while_they_train, world_size):
        assert found == {LOOPBACK}, "gloo listens in every rank, the store in rank 0"
        assert interfaces == ["lo", "lo"], "elsewhere this machine's name may lead to another interface"


def _listening_while_they_train() -> tuple[set[str], list[str]]:
    import torch
    import torch.distributed as dist

    from parallel.launch import initialize_distributed

    initialize_distributed()
    dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo"))
    return listening(), [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]


def test_the_store_is_bound_to_the_named_interface() -> None:
    place = Place(0, 2, 0, "127.0.0.2", free_port())
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(open_store, Place(1, 2, 1, place.address, place.port), 20.0)
        store = open_store(place, 20.0)
        store.set("key", "value")
        assert other.result().get("key") == b"value"
    with listen("0.0.0.0", 0) as everywhere, listen("127.0.0.1", 0) as here:
        assert everywhere.getsockname()[0] == "0.0.0.0" and here.getsockname()[0] == "127.0.0.1"


def test_a_name_that_leads_to_no_interface_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some systems give a machine's own name the address 127.0.1.1, and behind a NAT it is another machine's."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.1.1", "192.0.2.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen("node1", 0) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
    said = capsys.readouterr().err
    assert said.startswith("warning: MASTER_ADDR=node1 leads to no interface") and said.count("\n") == 1


def test_a_taken_port_is_said_in_a_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"rank 0 of 2 cannot join the others at 127.0.0.1:{port} \(Address already"
        ):
            open_store(Place(0, 2, 0, "127.0.0.1", port), 1.0)


def test_two_launchers_with_one_port_keep_apart() -> None:
    """DeepSpeed's launcher always says port 29500."""
    assert run_ranks(_launcher, 2) == [["0 0", "0 0"], ["1 1", "1 1"]]


def _launcher() -> list[str]:
    """Fork two ranks, which exchange the name of their launcher, and return what each has received."""
    read, write = os.pipe()
    children = [os.fork() or _rank(rank, os.environ["RANK"], write) for rank in (1, 0)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(write)
    with open(read) as pipe:
        return pipe.read().splitlines()


def _rank(rank: int, launcher: str, write: int) -> None:
    status = 1
    try:
        store = open_store(Place(rank, 2, rank, "127.0.0.1", 29500, shares_launcher=True), 30.0)
        store.set(f"{rank}", launcher)
        os.write(write, b"%s %s\n" % (store.get("0"), store.get("1")))
        store.set(f"{rank} has read", "")
        store.wait(["0 has read", "1 has read"])
        if rank == 0:
            store.wait(["1 has left"])
        else:
            store.set("1 has left", "")
        status = 0
    finally:
        os._exit(status)


def test_a_meeting_point_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_meeting_point", lambda: f"\0test/{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(meeting._meeting_point())
        planted.listen()
        monkeypatch.setattr(meeting, "_user_at", lambda connection: os.getuid() + 1)
        with pytest.raises(LaunchError, match=r"rank 1 of 2 .* on this machine \(user \d+ listens where rank 0 should"):
            open_store(Place(1, 2, 1, "127.0.0.1", 29500, shares_launcher=True), 5.0)
        with pytest.raises(LaunchError, match="Address already in use"):
            open_store(Place(0, 2, 0, "127.0.0.1", 29500, shares_launcher=True), 5.0)


def test_a_rank_zero_that_does_not_come_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_meeting_point", lambda: f"\0nobody/{os.getpid()}")
    with pytest.raises(LaunchError, match=r"rank 0 has not opened the store within 0\.2 seconds"):
        open_store(Place(1, 2, 1, "127.0.0.1", 29500, shares_launcher=True), 0.2)
