"""Measures time, memory and waits of a step without slowing it down."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from train.benchmark.exposed import Kernel

MATMUL_SIZE = 8192


def timed(step: Callable[[], Any], steps: int) -> list[float]:
    """Time `steps` steps, in seconds, after one warm-up step. On a GPU, events take the time, without waits between."""
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
    """Return the median seconds that the host takes to launch a step on an idle device; None without a GPU.

    If this is near the time of a step or above it, the device may wait for the host. The host may also wait for the
    device: CUDA queues about 1,000 kernels.
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
    """Return the bytes that PyTorch has reserved on the device, after freeing unused blocks."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def count_device_waits(step: Callable[[], Any]) -> int | None:
    """Count how often a step makes the host wait for the device; None without a GPU.

    It waits if asked to synchronize, as timers do, or if it reads a result. PyTorch's own detector reports the latter.
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


def device_kernels(step: Callable[[], Any], steps: int) -> list[Kernel]:
    """Trace `steps` steps and return what ran on the device; nothing without a GPU.

    Named ranges, as FSDP2 and NCCL have them, span kernels and are left out.
    """
    if not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def kernel_times(kernels: list[Kernel], steps: int) -> list[tuple[str, float, float]]:
    """Return (kernel, launches per step, milliseconds per step), the longest first."""
    found: dict[str, list[float]] = {}
    for kernel in kernels:
        found.setdefault(kernel.name, []).append(kernel.end_ms - kernel.start_ms)
    rows = [(name, len(times) / steps, sum(times) / steps) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def matmul_tflops() -> tuple[float, float]:
    """Measure TFLOP/s of a bf16 product of two random square matrices.

    Returns:
        Two medians of ten products: on a cool device, as usually quoted, and after half a second of products, when the
        power limit acts as it does in training.
    """
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for warm_up in (3, 300):
        timed(lambda: a @ b, warm_up)
        rates.append(2 * MATMUL_SIZE**3 / statistics.median(timed(lambda: a @ b, 10)) / 1e12)
    return rates[0], rates[1]
