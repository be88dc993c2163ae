"""Test clipping and skipped steps, which do not wait for the device, against PyTorch's own."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.engine.clipping import decide_on_device, global_norm
from parallel.layout import Layout, parse_layout
from parallel.local_ranks import run_ranks
from parallel.micro_batch import MicroBatch
from tests.parallel.tiny import VOCAB_SIZE, tiny_config, training_with
from train.compare.layouts import apply_layout


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def step(max_norm: float, spoil: float | None = None) -> list[torch.nn.Parameter]:
    own = parameters()
    if spoil is not None:
        own[1].grad[2] = spoil
    adam = torch.optim.AdamW(own, lr=0.1, weight_decay=0.3, fused=True)
    norm = global_norm([p.grad for p in own])
    report: Any = SimpleNamespace(gradient_norm=norm, accepted=norm.isfinite())
    decide_on_device(adam, lambda: report, max_norm)
    adam.step()
    assert not adam.state or all(state["step"] == report.accepted for state in adam.state.values())
    return own


@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
def test_the_step_is_that_of_clipped_gradients(max_norm: float) -> None:
    own, expected = step(max_norm), parameters()
    if max_norm:
        torch.nn.utils.clip_grad_norm_(expected, max_norm)
    torch.optim.AdamW(expected, lr=0.1, weight_decay=0.3).step()
    for value, same in zip(own, expected, strict=True):
        torch.testing.assert_close(value, same)


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_the_step_out(spoil: float) -> None:
    for value, before in zip(step(1.0, spoil), parameters(), strict=True):
        assert torch.equal(value, before)


def _waits_asked_for(layout: Layout) -> int:
    """Count how often DeepSpeed synchronizes with the device in five steps on this rank."""
    from deepspeed.accelerator import get_accelerator

    from train.parts import build_engine

    config = apply_layout(tiny_config(), layout, Layout(acc=1))
    engine = build_engine(training_with(config, precision="bf16"), VOCAB_SIZE)
    tokens = torch.randint(VOCAB_SIZE, (config.training.micro_batch_size, config.model.seq_length + 1)).t()
    with mock.patch.object(get_accelerator(), "synchronize") as asked:
        for _ in range(5):
            engine.train_step(
                iter([MicroBatch(tokens[:-1], tokens[1:])] * config.num_micro_batches(layout.world_size)), 1e-3
            )
    return asked.call_count


@pytest.mark.parametrize("layout", ["dp=1", "dp=2:zero=2", "dp=2:zero=3", "pp=2"])
def test_no_timer_waits_for_the_device(layout: str) -> None:
    parsed = parse_layout(layout)
    assert run_ranks(_waits_asked_for, parsed.world_size, parsed) == [0] * parsed.world_size
