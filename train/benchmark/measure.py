"""Measures a contender on every rank, and reduces what the ranks measured to one set of figures."""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from train.benchmark.contender import Contender
from train.benchmark.exposed import Overlap, overlap
from train.benchmark.timing import (
    count_device_waits,
    device_kernels,
    host_time,
    kernel_times,
    reserved_bytes,
    timed,
)
from train.cost.flops import mfu, training_flops_per_token

WARM_UP_STEPS = 4
TRACED_STEPS = 2


@dataclass
class Figures:
    """What one rank measured, or all of them together.

    Attributes:
        losses: cross-entropy of the first steps in nats a token, over all ranks.
        step_times_s: of each timed step.
        peak_memory_gib: reserved by PyTorch; None on a CPU, as all that follow.
        device_waits: how often a step makes the host wait for the device.
        host_time_s: of launching a step.
        kernels: name, launches a step, and milliseconds a step.
        overlap: of a step's kernels.
    """

    losses: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    peak_memory_gib: float | None = None
    device_waits: int | None = None
    host_time_s: float | None = None
    kernels: list[tuple[str, float, float]] = field(default_factory=list)
    overlap: Overlap | None = None


def warmed_up(contender: Contender, steps: int = WARM_UP_STEPS) -> Figures:
    """Run a contender's first steps, and return figures with their losses.

    Raises:
        SystemExit: a step was refused. Such a step is spared the optimizer's work, so it must not be timed.
    """
    reports = [contender.step() for _ in range(steps)]
    if not all(report.accepted for report in reports):
        raise SystemExit(f"{contender.name}: loss or gradients are not finite; it cannot be timed as a training step")
    return Figures([report.wait().cross_entropy for report in reports])


@contextlib.contextmanager
def memory_measured(figures: Figures, reserved_before: int = 0) -> Iterator[None]:
    """Measure what the steps in the context reserve on the device beyond `reserved_before` bytes."""
    if not torch.cuda.is_available():
        yield
        return
    reserved_bytes()
    torch.cuda.reset_peak_memory_stats()
    yield
    figures.peak_memory_gib = (torch.cuda.max_memory_reserved() - reserved_before) / 2**30


def measure_host(contender: Contender, figures: Figures) -> None:
    """Measure what a contender's step costs the host."""
    figures.device_waits = count_device_waits(contender.step)
    figures.host_time_s = host_time(contender.step)


def measure_kernels(contender: Contender, figures: Figures) -> None:
    """Trace a few steps; does nothing without a GPU."""
    kernels = device_kernels(contender.step, TRACED_STEPS)
    figures.kernels = kernel_times(kernels, TRACED_STEPS)
    figures.overlap = overlap(kernels, TRACED_STEPS)


def measure_times(contender: Contender, figures: Figures, steps: int) -> None:
    """Time steps, after one warm-up step, and add them to the figures."""
    figures.step_times_s += timed(contender.step, steps)


def over_ranks(ranks: list[Figures]) -> Figures:
    """Reduce the figures of all ranks: each step takes as long as on its slowest rank, and the largest memory counts.

    The kernels are rank 0's, and the overlap is that of the rank with most exposed communication.
    """

    def largest(name: str) -> Any:
        return max((value for each in ranks if (value := getattr(each, name)) is not None), default=None)

    overlaps = [each.overlap for each in ranks if each.overlap is not None]
    return Figures(
        losses=ranks[0].losses,
        step_times_s=[max(times) for times in zip(*(each.step_times_s for each in ranks), strict=True)],
        peak_memory_gib=largest("peak_memory_gib"),
        device_waits=largest("device_waits"),
        host_time_s=largest("host_time_s"),
        kernels=ranks[0].kernels,
        overlap=max(overlaps, key=lambda each: each.exposed_ms, default=None),
    )


def speed(figures: Figures, contender_config: Any, vocab_size: int, ranks: int, device: str) -> dict[str, Any]:
    """Return the figures that follow from the median step.

    Args:
        contender_config: whose model and global batch were trained.
        device: name of the GPU; of another device MFU is None.
    """
    step_time_s = statistics.median(figures.step_times_s)
    tokens_per_second = contender_config.tokens_per_step / step_time_s
    flops = training_flops_per_token(contender_config.model, vocab_size)
    return {
        "step_time_s": step_time_s,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_gpu": tokens_per_second / ranks,
        "flops_per_token": flops,
        "tflops_per_gpu": tokens_per_second * flops / ranks / 1e12,
        "mfu": mfu(tokens_per_second, flops, device, ranks),
    }
