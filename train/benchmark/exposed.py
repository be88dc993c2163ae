"""Tells how much of a step's communication is exposed: a network kernel runs and no other kernel does.

A network kernel also runs while it waits for its peers, so a pipeline's bubble and a rank that is behind count as
exposed communication of those that wait. A copy from another GPU counts as a network kernel
(`parallel.sharding.transport`). It starts when its peer is ready, so the wait before it counts as idle.
"""

from collections.abc import Iterable
from dataclasses import dataclass

NETWORK = ("nccl", "symm_mem", "multimem", "memcpy ptop")
"""A kernel or copy whose name contains one of these communicates; upper and lower case are alike."""


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy that ran on the device; times in milliseconds."""

    name: str
    start_ms: float
    end_ms: float

    @property
    def communicates(self) -> bool:
        name = self.name.lower()
        return any(word in name for word in NETWORK)


@dataclass(frozen=True)
class Overlap:
    """A step's time on the device by what ran, in milliseconds.

    Attributes:
        communication_ms: a network kernel ran.
        exposed_ms: a network kernel ran, and nothing else did.
        idle_ms: no kernel ran, between the first and the last one.
    """

    communication_ms: float
    exposed_ms: float
    idle_ms: float


def overlap(kernels: Iterable[Kernel], steps: int) -> Overlap | None:
    """Return how kernels overlapped, as means over the `steps` that ran them; None if there are none."""
    marks: list[tuple[float, int, int]] = []  # when, change of running network kernels, change of others
    for kernel in kernels:
        network = int(kernel.communicates)
        marks += [(kernel.start_ms, network, 1 - network), (kernel.end_ms, -network, network - 1)]
    if not marks:
        return None
    marks.sort(key=lambda mark: mark[0])
    communication = exposed = idle = 0.0
    networks = others = 0
    since = marks[0][0]
    for when, network, other in marks:
        lasted, since = when - since, when
        communication += lasted if networks else 0.0
        exposed += lasted if networks and not others else 0.0
        idle += lasted if not networks and not others else 0.0
        networks, others = networks + network, others + other
    return Overlap(communication / steps, exposed / steps, idle / steps)
