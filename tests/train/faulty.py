"""Runs of train.main in which something goes wrong on purpose; each function runs on every rank."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.train.runs import Output, main_output


def with_bad_samples(arguments: list[str], first: int, end: int, factor: float, on_rank: int) -> Output:
    """The loss of steps that read samples in [first, end) is multiplied by `factor` on one rank."""
    import train.loop.trainer
    from parallel.sharding.stage import Stage

    streams: list[Any] = []
    open_stream, loss = train.loop.trainer.open_stream, Stage.loss

    def remembered(*args: Any) -> Any:
        streams.append(open_stream(*args))
        return streams[-1]

    def faulty(self: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = loss(self, x, labels)
        is_bad = first < streams[0].samples_consumed <= end and int(os.environ["RANK"]) == on_rank
        if self.training and is_bad:
            self.measure("ce_loss", value * (factor - 1))
            value = value * factor
        return value

    train.loop.trainer.open_stream, Stage.loss = remembered, faulty  # type: ignore[assignment,method-assign]
    return main_output(arguments)


def with_slow_rank(arguments: list[str], on_rank: int, seconds: float, from_step: int = 0) -> Output:
    """One rank's forward pass takes longer, from a step on."""
    from parallel.sharding.stage import Stage

    body, calls = Stage.body, 0

    def slow(self: Any, *inputs: Any) -> Any:
        nonlocal calls
        calls += self.training
        if self.training and int(os.environ["RANK"]) == on_rank and calls > from_step:
            time.sleep(seconds)
        return body(self, *inputs)

    Stage.body = slow  # type: ignore[method-assign]
    return main_output(arguments)


def with_lost_weights(arguments: list[str], step: int) -> Output:
    """The update of one step makes a weight of rank 0 NaN, the first time that it is done."""
    from parallel.engine.engine import Engine

    train_step, calls = Engine.train_step, 0

    def faulty(self: Any, *inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = train_step(self, *inputs)
        if calls == step and os.environ["RANK"] == "0":
            chunks = [chunk for chunk in self.state_chunks(64) if chunk.name.startswith("model.")]
            chunks[0].tensor.view(-1)[0] = float("nan")
            next(self.stage.parameters()).data.view(-1)[0] = float("nan")
        return result

    Engine.train_step = faulty  # type: ignore[method-assign]
    return main_output(arguments)


def with_too_little_memory(arguments: list[str], in_step: int) -> Output:
    """A step asks for more memory than there is, in a GPU's words."""
    from parallel.engine.engine import Engine

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


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def killed_before_change(arguments: list[str], log: str, number: int) -> None:
    """kill -9 by itself before the change `number` (from 1) to a file or folder of its run, or right after a row."""
    import train.main
    from train.run.journal import Journal
    from train.run.rows import JsonLines

    folder = next(word for word in arguments if word.startswith("run_dir=")).removeprefix("run_dir=")
    seen, run_main = 0, train.main.main

    def change() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(args[0]).startswith(folder):
            change()

    def counted(write: Callable[..., None]) -> Callable[..., None]:
        def writing(*args: Any, **fields: Any) -> None:
            change()
            write(*args, **fields)
            change()

        return writing

    def counting(arguments: list[str]) -> int:
        status = run_main(arguments)
        Path(log).with_name("changes").write_text(str(seen))
        return status

    JsonLines.write = counted(JsonLines.write)  # type: ignore[method-assign]
    Journal.write = counted(Journal.write)  # type: ignore[method-assign]
    train.main.main = counting  # type: ignore[assignment]
    sys.addaudithook(watch)
    with_output_to_file(arguments, log)


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def with_lost_gradient(arguments: list[str], on_rank: int | None = None) -> Output:
    """Temperatures act, and get no gradient: on every rank, or on one."""
    from model.transformer import Attention

    temperature = Attention.temperature

    def lost(self: Any) -> Any:
        found = temperature(self)
        return found.detach() if on_rank in (None, int(os.environ["RANK"])) else found

    Attention.temperature = lost  # type: ignore[method-assign]
    return main_output(arguments)


def with_compiler(arguments: list[str], fault: str) -> Output:
    """What stands in for the compiler gives blocks that run as they are, with a fault in the backward pass."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * 1.5

    faults = {"none": lambda x: x, "input lost": torch.Tensor.detach, "input scaled": Scaled.apply}

    def compile_wrongly(function: Any, **options: Any) -> Any:
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1  # as the compiler does
        return lambda x, *others: function(faults[fault](x), *others)

    torch.compile = compile_wrongly
    return main_output(arguments)


def without_compiler(arguments: list[str]) -> Output:
    """The compiler is turned off, as an environment variable does."""
    torch.compile = lambda function, **options: function
    return main_output(arguments)
