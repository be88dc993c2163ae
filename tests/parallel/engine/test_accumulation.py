"""Test that gradients accumulated all at once equal those that DeepSpeed accumulates one by one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.engine.accumulation import accumulate_together
from parallel.layout import Layout, parse_layout
from parallel.local_ranks import run_ranks
from parallel.micro_batch import MicroBatch
from tests.parallel.tiny import VOCAB_SIZE, tiny_config, training_with
from train.compare.layouts import apply_layout


def _fake() -> Any:
    shapes = ((5, 3), (7,), (2, 2))
    return SimpleNamespace(
        bf16_groups=[[torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]],
        fp32_groups_gradients=[[torch.zeros(shape).flatten() for shape in shapes]],
        fp32_groups_has_gradients=[[False] * len(shapes)],
        fp32_groups_gradients_flat=[None],
        fp32_groups_gradient_flat_partition=[None],
        real_dp_process_group=[None],
        update_hp_grads=lambda clear_lp_grads=False: None,
        clear_hp_grads=lambda: None,
        backward_prologue=lambda: None,
        autoep_folding_tp_group=None,
    )


def test_sums_and_flags_are_deepspeeds() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    ours, theirs = _fake(), _fake()
    accumulate_together(ours)
    for given in ((0, 1), (0, 1, 2), (2,)):  # which parameters have a gradient in each micro-batch
        for index in given:
            gradient = torch.randn_like(ours.bf16_groups[0][index])
            ours.bf16_groups[0][index].grad, theirs.bf16_groups[0][index].grad = gradient, gradient.clone()
            BF16_Optimizer._update_hp_grad(theirs, theirs.bf16_groups[0][index], 0, index, False)
        ours.update_hp_grads()
    assert ours.fp32_groups_has_gradients == theirs.fp32_groups_has_gradients == [[True] * 3]
    for found, expected in zip(ours.fp32_groups_gradients[0], theirs.fp32_groups_gradients[0], strict=True):
        assert torch.equal(found, expected)
    before = [total.clone() for total in ours.fp32_groups_gradients[0]]
    ours.clear_hp_grads()  # the next step
    assert ours.fp32_groups_has_gradients == [[False] * 3]
    for given in ((0,), (1, 0)):
        for index in given:
            ours.bf16_groups[0][index].grad = torch.ones_like(ours.bf16_groups[0][index])
        ours.update_hp_grads()
    assert ours.fp32_groups_has_gradients == [[True, True, False]]
    for total, old, expected in zip(ours.fp32_groups_gradients[0], before, (2, 1, 0), strict=True):
        assert old.abs().sum() > 0 and torch.equal(total, torch.full_like(total, expected))
    for parameter, total in zip(ours.bf16_groups[0], ours.fp32_groups_gradients[0], strict=True):
        assert parameter.grad is None and parameter._hp_grad is total


def _averaged() -> list[tuple[int, torch.Tensor]]:
    """Average sums that bf16 could not hold; return start and average of each part that this rank steps."""
    from train.parts import build_engine

    layout = parse_layout("dp=3")
    config = apply_layout(tiny_config(global_batch_size=12), layout, layout)
    config = training_with(config, precision="bf16")
    engine = build_engine(config, VOCAB_SIZE).engine
    optimizer = engine.optimizer
    for flat in optimizer.fp32_groups_gradients_flat:
        flat.copy_(1 + 2**-20 * (torch.distributed.get_rank() + torch.arange(flat.numel()) % 5))
    engine.buffered_allreduce_fallback()
    # a norm counts parts whose gradient may have come from another replica alone
    assert len(optimizer.get_grads_for_norm()[0]) > 1
    return [(part.storage_offset(), part.clone()) for part in optimizer.fp32_groups_gradient_flat_partition]


def test_gradients_are_averaged_in_the_type_they_are_summed_in() -> None:
    ranks = run_ranks(_averaged, 3)
    for parts in zip(*ranks, strict=True):
        assert [start for start, _ in parts] == [rank * parts[0][1].numel() for rank in range(3)]
        average = torch.cat([part for _, part in parts])
        torch.testing.assert_close(average, 1 + 2**-20 * (1 + torch.arange(average.numel()) % 5), rtol=2e-7, atol=0)


def _trained(layout: Layout, one_by_one: bool) -> list[torch.Tensor]:
    """Return this rank's parameters after three steps in bf16, with DeepSpeed's own accumulation or ours."""
    from unittest import mock

    from parallel.engine import engine as module
    from train.parts import build_engine

    config = apply_layout(tiny_config(granularity="per_head"), layout, Layout(acc=1))
    config = training_with(config, precision="bf16")
    own = module.deepspeed_config

    def immediate(*arguments: Any) -> dict[str, Any]:
        derived = own(*arguments)
        derived["bf16"]["immediate_grad_update"] = True
        return derived

    if one_by_one:
        with (
            mock.patch.object(module, "accumulate_together", lambda optimizer: None),
            mock.patch.object(module, "deepspeed_config", immediate),
        ):
            engine = build_engine(config, VOCAB_SIZE)
    else:
        engine = build_engine(config, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(engine.groups.grid.replica)
    shape = (config.model.seq_length + 1, config.training.micro_batch_size)
    for _ in range(3):
        count = config.num_micro_batches(layout.world_size)
        tokens = [torch.randint(VOCAB_SIZE, shape, generator=generator) for _ in range(count)]
        engine.train_step(iter([MicroBatch(each[:-1], each[1:]) for each in tokens]), 1e-2)
    return [parameter.detach().clone() for parameter in engine.stage.parameters()]


@pytest.mark.parametrize("layout", ["acc=2", "dp=2", "tp=2:sp=1:acc=2", "pp=2:acc=2"])
def test_training_is_the_same_to_the_last_bit(layout: str) -> None:
    parsed = parse_layout(layout)
    ours, theirs = (run_ranks(_trained, parsed.world_size, parsed, one_by_one) for one_by_one in (False, True))
    for found, expected in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert any(parameter.abs().sum() > 0 for parameter in found)
