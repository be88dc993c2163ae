"""Runs of train.main in which something goes wrong on purpose; each function runs on every rank."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.train.runs import Output, main_output


def with_bad_samples(arguments: list[str], first: int, end: int, factor: float, on_rank: int) -> Output:
    """The loss of steps that read samples in [first, end) is multiplied by `factor` on one rank."""
    import train.trainer
    from parallel.stage import Stage

    streams: list[Any] = []
    open_stream, loss = train.trainer.open_stream, Stage.loss

    def remembered(*args: Any) -> Any:
        streams.append(open_stream(*args))
        return streams[-1]

    def faulty(self: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = loss(self, x, labels)
        is_bad = first < streams[0].samples_consumed <= end and int(os.environ["RANK"]) == on_rank
        if self.training and is_bad:
            self.statistics.cross_entropy += value.detach() * (factor - 1)
            value = value * factor
        return value

    train.trainer.open_stream, Stage.loss = remembered, faulty  # type: ignore[assignment,method-assign]
    return main_output(arguments)


def with_slow_rank(arguments: list[str], on_rank: int, seconds: float, from_step: int = 0) -> Output:
    """One rank's forward pass takes longer, from a step on."""
    from parallel.stage import Stage

    body, calls = Stage.body, 0

    def slow(self: Any, *inputs: Any) -> Any:
        nonlocal calls
        calls += self.training
        if self.training and int(os.environ["RANK"]) == on_rank and calls > from_step:
            time.sleep(seconds)
        return body(self, *inputs)

    Stage.body = slow  # type: ignore[method-assign]
    return main_output(arguments)


def with_too_little_memory(arguments: list[str], in_step: int) -> Output:
    """A step asks for more memory than there is, in a GPU's words."""
    from parallel.engine import Engine

    step, calls = Engine.train_step, 0

    def faulty(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == in_step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 79.18 GiB of which ..."
            )
        return step(self, *args)

    Engine.train_step = faulty  # type: ignore[method-assign]
    return main_output(arguments)


def with_output_to_file(arguments: list[str], file: str) -> int:
    """As a process of its own would: real file descriptors, since what ends a process at once flushes nothing."""
    from train.main import main

    with open(f"{file}.{os.environ['RANK']}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        status = main(arguments)
        os._exit(status)


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
