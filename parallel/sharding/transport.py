"""Exchange parts of tensors between the ranks of a group while the device computes.

    arrivals = transport(group).start(offered)     # offered[r] is what rank r gets; this rank's own entry is None
    ...                                            # products that do not need it
    part = arrivals.wait(r)                        # what rank r offered to this one

NCCL moves data with kernels, and these need the processors that matrix products occupy: beside products, an exchange
over NVLink took as long as after them (docs/notes/many-gpus.md). The GPU's copy engines need none. So between GPUs of
one host each rank lays out what it offers in memory that its peers can read, tells them so by writing a flag, and they
fetch it. Streams wait for flags and write them without any kernel.

    this rank's stream    wait until slot s is fetched, lay out, write the peers' `ready` flags
    a stream of copies    wait for the own `ready` flag of a peer, fetch its part, write the peer's `fetched` flag

A flag is 1 or 0, and whoever waited for it clears it. So an exchange can be captured in a CUDA graph and replayed.
Exchanges take turns in `SLOTS` slots of memory; all ranks of a group must start the same exchanges in the same order,
as with collectives.

Between hosts, on CPUs, and where a GPU cannot read its peer's memory, parts go through one collective of
torch.distributed.
"""

import ctypes
import functools
import os
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

SLOTS = 3
ALIGNMENT_BYTES = 256
FLAG_BYTES = 4
_LEAST_SLOT_BYTES = 1 << 20

Parts = Sequence[Tensor | None]


class Arrivals(Protocol):
    """A running exchange; every part must be waited for before `received` is released.

    Attributes:
        received: [ranks, ...]; entry r is what rank r offered to this one. This rank's own entry is the caller's.
    """

    received: Tensor

    def wait(self, rank: int) -> Tensor:
        """Return `received[rank]`; the current stream waits until it is there."""

    def wait_all(self) -> Tensor:
        """Return `received`; the current stream waits until all of it is there."""


class Transport(Protocol):
    """Exchanges parts between the ranks of one group.

    Attributes:
        can_be_captured: whether its exchanges may be part of a CUDA graph.
    """

    can_be_captured: bool

    def outgoing(self, shape: Sequence[int], like: Tensor, same: bool = False) -> list[Tensor | None]:
        """Return memory for a product to write its parts for the peers into; copy engines then send it from there.

        The next `start` of the group must take these parts.

        Args:
            shape: of each part.
            like: a tensor of the parts' type and device.
            same: whether all peers get the same part.
        """

    def start(self, offered: Parts) -> Arrivals:
        """Begin to exchange parts.

        Args:
            offered: entry r is what rank r of the group gets; the own entry is None. All parts have one shape.
                They must not be changed before all that the peers offer has been waited for.
        """


def transport(group: ProcessGroup) -> Transport:
    """Return the group's transport; the first call for a group sets it up, and all its ranks must make it."""
    found = _transports.get(group)
    if found is None:
        found = _transports[group] = PeerCopies(group) if _can_copy(group) else Collectives(group)
    return found


_transports: dict[ProcessGroup, Transport] = {}  # a later group may have the name of one that was destroyed


def but_own(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor | None]:
    """Return a part for each rank of the group as `Transport.start` takes them: None for this one."""
    return [None if rank == group.rank() else part for rank, part in enumerate(parts)]


class Collectives:
    """Exchanges parts with one collective of torch.distributed."""

    can_be_captured = False  # training hung when NCCL's calls were captured (docs/notes/many-gpus.md)

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def outgoing(self, shape: Sequence[int], like: Tensor, same: bool = False) -> list[Tensor | None]:
        ranks = self.group.size()
        places = [like.new_empty(shape)] * ranks if same else list(like.new_empty((ranks, *shape)))
        return but_own(places, self.group)

    def start(self, offered: Parts) -> Arrivals:
        parts = [part for part in offered if part is not None]
        arriving = parts[0].new_empty((self.group.size(), *parts[0].shape))
        if _all_same(parts):
            sent = parts[0].contiguous()
            work = dist.all_gather_into_tensor(arriving.view(-1), sent.view(-1), group=self.group, async_op=True)
        else:
            sent = torch.stack([parts[0] if part is None else part for part in offered])
            work = dist.all_to_all_single(arriving, sent, group=self.group, async_op=True)
        return _CollectiveArrivals(arriving, sent, work, self.group.rank())


class _CollectiveArrivals:
    def __init__(self, arriving: Tensor, sent: Tensor, work: Any, rank: int) -> None:
        self._arriving, self._sent, self._work, self._rank = arriving, sent, work, rank
        self.received = torch.empty_like(arriving)  # a collective writes this rank's own entry too

    def wait(self, rank: int) -> Tensor:
        return self.wait_all()[rank]

    def wait_all(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
            for place in (slice(0, self._rank), slice(self._rank + 1, None)):
                self.received[place].copy_(self._arriving[place])
        return self.received


class PeerCopies:
    """Exchanges parts between GPUs of one host by copy engines."""

    can_be_captured = True

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        self.peers = [(self.rank + step) % self.ranks for step in range(1, self.ranks)]
        self._copies = torch.cuda.Stream()
        self._turn = 0
        self._laid_out: tuple[int, int] | None = None  # the slot that `outgoing` gave, and its parts' stride
        self._flags = _shared(2 * SLOTS * self.ranks * FLAG_BYTES, group)
        self._flags.memory.view(torch.int32)[SLOTS * self.ranks :] = 1  # every slot starts as fetched
        self._slot_bytes, self._memory = 0, self._flags
        self._captured: list[_SharedMemory] = []  # memory that CUDA graphs use
        self._meet()

    def outgoing(self, shape: Sequence[int], like: Tensor, same: bool = False) -> list[Tensor | None]:
        assert self._laid_out is None, "start the exchange of the parts that `outgoing` gave before"
        part_bytes = _numel(shape) * like.itemsize
        stride = 0 if same else -(-part_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        slot = self._take_slot(part_bytes if same else stride * (self.ranks - 1))
        self._laid_out = slot, stride
        parts = [
            None
            if rank == self.rank
            else self._part(self._memory.memory, slot, self._place(self.rank, rank) * stride, shape, like.dtype)
            for rank in range(self.ranks)
        ]
        return parts

    def start(self, offered: Parts) -> Arrivals:
        parts = [part for part in offered if part is not None]
        first = parts[0]
        if self._laid_out is None:
            same = _all_same(parts)
            slots = self.outgoing(first.shape, first, same)
            for rank, part in enumerate(offered):
                into = slots[rank]
                if into is not None and part is not None and (not same or part is first):
                    into.copy_(part)
                    if same:
                        break
        assert self._laid_out is not None
        (slot, stride), self._laid_out = self._laid_out, None
        current = torch.cuda.current_stream()
        for peer in self.peers:
            _write(current, self._ready(peer, slot, self.rank), 1)
        received = first.new_empty((self.ranks, *first.shape))  # contiguous, of memory that earlier kernels may use
        self._copies.wait_stream(current)
        events: dict[int, torch.cuda.Event] = {}
        for peer in self.peers:
            flag = self._ready(self.rank, slot, peer)
            _wait(self._copies, flag)
            _write(self._copies, flag, 0)
            theirs = self._memory.of(peer)
            with torch.cuda.stream(self._copies):
                source = self._part(theirs, slot, self._place(peer, self.rank) * stride, first.shape, first.dtype)
                received[peer].copy_(source, non_blocking=True)
            _write(self._copies, self._fetched(peer, slot, self.rank), 1)
            events[peer] = torch.cuda.Event()
            events[peer].record(self._copies)
        return _CopiedArrivals(received, events)

    def _take_slot(self, needed_bytes: int) -> int:
        """Return the next slot, once its last parts have been fetched; the current stream waits for that."""
        if needed_bytes > self._slot_bytes:
            self._grow(needed_bytes)
        if torch.cuda.is_current_stream_capturing() and self._memory not in self._captured:
            self._captured.append(self._memory)
        slot, self._turn = self._turn, (self._turn + 1) % SLOTS
        current = torch.cuda.current_stream()
        for peer in self.peers:
            flag = self._fetched(self.rank, slot, peer)
            _wait(current, flag)
            _write(current, flag, 0)
        return slot

    def _grow(self, needed_bytes: int) -> None:
        assert not torch.cuda.is_current_stream_capturing(), "an exchange must have run once before it is captured"
        self._slot_bytes = max(-(-needed_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, _LEAST_SLOT_BYTES)
        self._meet()  # all parts of the old memory are fetched
        self._memory = _shared(SLOTS * self._slot_bytes, self.group)
        self._meet()

    def _meet(self) -> None:
        torch.cuda.synchronize()
        dist.barrier(self.group, device_ids=[torch.cuda.current_device()])
        torch.cuda.synchronize()

    def _place(self, owner: int, peer: int) -> int:
        """Return the position of a peer's part among those that an owner lays out."""
        return peer - (peer > owner)

    def _part(self, memory: Tensor, slot: int, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        begin = slot * self._slot_bytes + start
        return memory[begin : begin + _numel(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def _ready(self, owner: int, slot: int, peer: int) -> int:
        """Return the address of the flag at `owner` that `peer` sets when its parts are laid out."""
        return self._flags.address(owner) + FLAG_BYTES * (slot * self.ranks + peer)

    def _fetched(self, owner: int, slot: int, peer: int) -> int:
        """Return the address of the flag at `owner` that `peer` sets when it has fetched its part."""
        return self._flags.address(owner) + FLAG_BYTES * ((SLOTS + slot) * self.ranks + peer)


class _CopiedArrivals:
    def __init__(self, received: Tensor, events: dict[int, torch.cuda.Event]) -> None:
        self.received, self._events = received, events

    def wait(self, rank: int) -> Tensor:
        torch.cuda.current_stream().wait_event(self._events[rank])
        return self.received[rank]

    def wait_all(self) -> Tensor:
        for event in self._events.values():
            torch.cuda.current_stream().wait_event(event)
        return self.received


class _SharedMemory:
    """Bytes on every rank's GPU that all ranks of a group can address."""

    def __init__(self, memory: Tensor, handle: Any) -> None:
        self.memory, self._handle = memory, handle

    def address(self, rank: int) -> int:
        return int(self._handle.buffer_ptrs[rank])

    def of(self, rank: int) -> Tensor:
        """Return a rank's bytes as a tensor."""
        found: Tensor = self._handle.get_buffer(rank, self.memory.shape, self.memory.dtype)
        return found


def _shared(size_bytes: int, group: ProcessGroup) -> _SharedMemory:
    from torch.distributed import _symmetric_memory as symmetric_memory

    device = torch.device("cuda", torch.cuda.current_device())
    memory = symmetric_memory.empty(size_bytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(memory, group.group_name)
    memory.zero_()
    return _SharedMemory(memory, handle)


def _can_copy(group: ProcessGroup) -> bool:
    """Return whether all ranks of a group are GPUs of one host that can read each other's memory; all ranks ask."""
    if dist.get_backend(group) != "nccl" or group.size() == 1:
        return False
    mine = (socket.gethostname(), _boot(), os.environ.get("NCCL_P2P_DISABLE", "0") == "0" and _has_stream_flags())
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    if len(set(found)) > 1 or not mine[2]:
        return False
    works = torch.ones(1, device=torch.cuda.current_device())
    try:
        _shared(ALIGNMENT_BYTES, group)
    except (RuntimeError, ImportError, AttributeError):
        works.zero_()
    dist.all_reduce(works, op=dist.ReduceOp.MIN, group=group)
    return bool(works.item())


def _boot() -> str:
    """Return what tells this run of this machine from others of the same name; empty if the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return ""


@functools.cache
def _driver() -> ctypes.CDLL:
    """Return the CUDA driver with the functions that wait for and write a number in memory, in a stream's order."""
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        getattr(driver, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return driver


def _has_stream_flags() -> bool:
    try:
        return bool(_driver())
    except (OSError, AttributeError):
        return False


WAIT_UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
WRITE_AFTER_ALL_BEFORE = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: other processors see earlier writes first


def _wait(stream: torch.cuda.Stream, address: int) -> None:
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, 1, WAIT_UNTIL_EQUAL))


def _write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, value, WRITE_AFTER_ALL_BEFORE))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA cannot wait for a flag of another GPU (error {status}); set NCCL_P2P_DISABLE=1")


def _all_same(parts: list[Tensor]) -> bool:
    return len(parts) > 1 and all(part is parts[0] for part in parts)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
