"""Compute one step's gradients without an engine, in any floating-point type.

float64 separates a wrong formula from rounding. Stages, regularizer and groups are those of training. The pipeline runs
one micro-batch after the other, gradients are averaged over replicas at the end, and no optimizer follows.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from model.initialize import named_parameters
from model.normalized_weights import update_spectral_norms
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage, StageStatistics


def accumulate_gradients(
    stage: Stage,
    groups: Groups,
    micro_batches: Iterator[MicroBatch],
    *,
    num_micro_batches: int,
    sequence_parallel: bool,
) -> StageStatistics:
    """Leave in every parameter's `grad` what the optimizer would get before clipping; all ranks call.

    Args:
        micro_batches: those of this rank.
        num_micro_batches: in the step.
        sequence_parallel: whether tensor-parallel ranks divide positions.

    Returns:
        The stage's statistics.
    """
    update_spectral_norms(stage)
    stage.train()
    stage.zero_grad()
    for _ in range(num_micro_batches):
        batch = next(micro_batches)
        held = batch.tokens_TB.shape[0] // (groups.grid.tp if sequence_parallel else 1)
        _run(stage, groups, batch, held, 1 / num_micro_batches)
    for parameter in stage.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=groups.data)
        parameter.grad /= groups.grid.replicas
        if parameter.has_partial_gradient:
            dist.all_reduce(parameter.grad, group=groups.tensor)
    tied = stage.tied_weight
    if tied is not None and groups.embedding_ends is not None:
        dist.all_reduce(tied.grad, group=groups.embedding_ends)
    return stage.take_statistics()


def gradient_norm(stage: Stage, groups: Groups) -> float:
    """Return the gradient's L2 norm over the whole model; a parameter that several ranks hold counts once."""
    grid, tied = groups.grid, stage.tied_weight
    total = torch.zeros((), dtype=torch.float64, device=next(stage.parameters()).device)
    for _, parameter in named_parameters(stage.transformer):
        whole_elsewhere = parameter.partition_dim is None and grid.tp_rank != 0
        if grid.replica == 0 and not whole_elsewhere and not (parameter is tied and not grid.is_first_stage):
            total += parameter.grad.double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())


def _run(stage: Stage, groups: Groups, batch: MicroBatch, positions: int, share: float) -> None:
    """Run one micro-batch forward and backward, with the stages before and after this one.

    Args:
        positions: of the hidden states that stages exchange.
        share: the micro-batch's share of the step's loss.
    """
    grid = groups.grid
    x = tokens_TB = batch.tokens_TB
    if not grid.is_first_stage:
        width, dtype = stage.transformer.config.hidden_size, next(stage.parameters()).dtype
        x = torch.empty((positions, tokens_TB.shape[1], width), dtype=dtype, device=tokens_TB.device)
        dist.recv(x, group=groups.pipeline, group_src=grid.stage - 1)
        x.requires_grad_()
    hidden = stage.body(x, batch.document_start_BT)
    if grid.is_last_stage:
        (stage.loss(hidden, batch.labels_TB) * share).backward()
    else:
        dist.send(hidden.detach().contiguous(), group=groups.pipeline, group_dst=grid.stage + 1)
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        dist.recv(gradient, group=groups.pipeline, group_src=grid.stage + 1)
        hidden.backward(gradient)
    if not grid.is_first_stage:
        assert x.grad is not None
        dist.send(x.grad.contiguous(), group=groups.pipeline, group_dst=grid.stage - 1)
