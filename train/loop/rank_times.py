"""Measures how long each rank computes, so that a slow one can be named.

All ranks' steps take equally long, since fast ranks wait for slow ones. What differs is a rank's own work: its forward
passes and its wait for data. Inside a tensor-parallel group the forward pass waits for the slowest rank too. There the
group is found rather than the rank.
"""

import platform
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.launch import local_device
from train.loop.clock import StepClock

SLOW = 1.5
"""A rank this many times slower than the median is named."""


class RankTimes:
    """Times this rank's forward passes and waits for data; every rank has one, and they gather together."""

    def __init__(self, module: nn.Module) -> None:
        self._clock = StepClock()
        self._steps = 0
        self._data_wait_s = 0.0
        self._hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._hosts, platform.node())
        module.register_forward_pre_hook(lambda *_: self._clock.mark())
        module.register_forward_hook(lambda *_: self._clock.mark(ends_step=module.training))

    def step(self, data_wait_s: float) -> None:
        self._steps += 1
        self._data_wait_s += data_wait_s

    def gather(self) -> dict[str, Any]:
        """Return every rank's mean seconds per step since the last call, and which rank is slowest by their sum."""
        own = torch.tensor([sum(self._clock.step_times_s()), self._data_wait_s], dtype=torch.float64)
        own /= max(1, self._steps)
        self._steps, self._data_wait_s = 0, 0.0
        everyone = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64)
        everyone[dist.get_rank()] = own
        everyone = everyone.to(local_device())
        dist.all_reduce(everyone)
        forward_s, data_wait_s = everyone.t().tolist()
        own_s = [sum(pair) for pair in zip(forward_s, data_wait_s, strict=True)]
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        return {
            "forward_s": forward_s,
            "data_wait_s": data_wait_s,
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
            "slowest_over_median": own_s[slowest] / max(statistics.median_low(own_s), 1e-9),
        }


def slow_words(times: dict[str, Any]) -> str | None:
    """Name the slowest rank in one line; return None if it does not hold the others up."""
    if len(times["forward_s"]) == 1 or times["slowest_over_median"] < SLOW:
        return None
    rank = times["slowest_rank"]
    forward_s, data_wait_s = times["forward_s"][rank], times["data_wait_s"][rank]
    return (
        f"rank {rank} on {times['slowest_host']} is slow: forward {forward_s:.3f} s and waiting for data "
        f"{data_wait_s:.3f} s a step, {times['slowest_over_median']:.1f} times the median"
    )
