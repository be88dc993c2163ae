"""Test that parts arrive unchanged, by collectives and by copy engines, whatever the order of waiting."""

from unittest import mock

import pytest
import torch

from parallel.launch import initialize_distributed, local_device
from parallel.local_ranks import run_ranks
from parallel.sharding.transport import Collectives, PeerCopies, transport
from tests.parallel.tiny import at_the_wait

ROUNDS = 9  # more than there are slots of memory
SHAPE = (6, 2, 5)


def part_of(sender: int, receiver: int, turn: int) -> torch.Tensor:
    """What a rank offers to another, which both can compute."""
    generator = torch.Generator().manual_seed(1000 * turn + 10 * sender + receiver)
    return torch.randn((turn + 1, *SHAPE), generator=generator)


def exchange_often(by: str) -> int:
    """Exchange distinct parts and the same part in turn, growing, with computing in between; return what is wrong."""
    initialize_distributed()
    group = torch.distributed.group.WORLD
    ranks, me, device = group.size(), group.rank(), local_device()
    own = transport(group)
    assert type(own).__name__ == by, f"{type(own).__name__} exchanges, not {by}"
    wrong = 0
    for turn in [*range(ROUNDS), *range(ROUNDS)]:  # grows, then begins small again
        same, lays_out = turn % 2 == 1, turn % 3 == 2
        values = [None if r == me else part_of(me, 0 if same else r, turn).to(device) for r in range(ranks)]
        if same:
            only = next(value for value in values if value is not None)
            values = [None if r == me else only for r in range(ranks)]
        if lays_out:
            laid_out = own.outgoing((turn + 1, *SHAPE), torch.empty(0, device=device), same)
            for into, value in zip(laid_out, values, strict=True):
                if into is not None and value is not None:
                    into.copy_(value)
            values = laid_out
        arrivals = own.start(values)
        other_work = torch.ones(400, 400, device=device) @ torch.ones(400, 400, device=device)
        for sender in sorted(range(ranks), key=lambda r: (r + turn) % ranks):
            if sender != me:
                expected = part_of(sender, 0 if same else me, turn).to(device)
                wrong += int((arrivals.wait(sender) != expected).any())
        wrong += int((other_work != 400).any())
    return wrong


def replay() -> int:
    """Capture exchanges in a CUDA graph and replay it with other values; return how many were wrong."""
    initialize_distributed()
    group = torch.distributed.group.WORLD
    ranks, me, own = group.size(), group.rank(), transport(group)
    offered = torch.zeros(SHAPE, device="cuda")

    def several() -> list[torch.Tensor]:
        results = []
        for factor in range(1, 6):
            scaled = offered * factor
            arrivals = own.start([None if r == me else scaled for r in range(ranks)])
            results.append(torch.stack([arrivals.wait(r) for r in range(ranks) if r != me]).sum(0))
        return results

    several()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = several()
    wrong = 0
    for turn in range(20):
        if turn == 10:  # more than the graph's memory holds
            larger = torch.zeros(1 << 20, device="cuda")
            own.start([None if r == me else larger for r in range(ranks)]).wait_all()
        offered.fill_(100 * turn + me)
        graph.replay()
        others = sum(100 * turn + r for r in range(ranks) if r != me)
        wrong += sum(int((result != others * factor).any()) for factor, result in enumerate(results, start=1))
    return wrong


def exchange_late() -> int:
    """Exchange often, with collectives that run when they are waited for."""
    names = ("all_gather_into_tensor", "all_to_all_single")
    with mock.patch.multiple(torch.distributed, **{name: at_the_wait(name) for name in names}):
        return exchange_often(Collectives.__name__)


def test_parts_arrive_through_collectives() -> None:
    assert run_ranks(exchange_late, 3) == [0, 0, 0]


@pytest.mark.gpu
def test_parts_arrive_through_copy_engines() -> None:
    ranks = _gpus()
    assert run_ranks(exchange_often, ranks, PeerCopies.__name__, use_gpu=True) == [0] * ranks


@pytest.mark.gpu
def test_parts_arrive_in_a_replayed_graph() -> None:
    ranks = _gpus()
    assert run_ranks(replay, ranks, use_gpu=True) == [0] * ranks


def _gpus() -> int:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.cuda.device_count()
