"""Clocks, memory and waits of a step, without disturbing it."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

MATMUL_SIZE = 8192


def timed(step: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each of `steps` steps after one that settles; on a GPU between events, never waiting between steps."""
    step()
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def host_time(step: Callable[[], Any], steps: int = 8) -> float | None:
    """Seconds in which the host has launched a step on an idle device, a median; None without a GPU.

    Near or above a step's own time it may mean that the device waits for the host, or that the host waits for room:
    CUDA takes about 1,000 kernels ahead.
    """
    if not torch.cuda.is_available():
        return None
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def reserved_bytes() -> int:
    """What PyTorch has reserved on the device, after giving unused blocks back."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def count_device_waits(step: Callable[[], Any]) -> int | None:
    """How often a step makes the host wait for the device: asked to, as timers do, or because it reads a result, which
    PyTorch's own detector reports; None without a GPU.
    """
    if not torch.cuda.is_available():
        return None
    with contextlib.ExitStack() as stack:
        asked = [
            stack.enter_context(mock.patch.object(place, "synchronize", autospec=True, side_effect=place.synchronize))
            for place in (torch.cuda, torch.cuda.Event)
        ]
        found = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        step()
    read = sum("called a synchronizing" in str(warning.message) for warning in found)
    return read + sum(each.call_count for each in asked)


def kernel_times(step: Callable[[], Any], steps: int = 3) -> list[tuple[str, float, float]]:
    """(kernel, launches a step, milliseconds a step), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time / 1e3)
    rows = [(name, len(times) / steps, sum(times) / steps) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def matmul_tflops() -> tuple[float, float]:
    """What the device's own bf16 product of two square matrices of random numbers reaches: as usually quoted, ten
    products on a cool device, and once half a second of them has brought the power limit to bear, as training does.
    """
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for warm_up in (3, 300):
        timed(lambda: a @ b, warm_up)
        rates.append(2 * MATMUL_SIZE**3 / statistics.median(timed(lambda: a @ b, 10)) / 1e12)
    return rates[0], rates[1]
