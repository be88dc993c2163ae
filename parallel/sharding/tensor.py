"""Tensor parallelism, applied from outside to a model built for one process.

Heads are split over ranks and everything that belongs to a head goes with it: rows of the query-key-value matrix,
columns of the output matrix, biases, temperatures, thresholds. The FFN's hidden features are split as in Megatron. The
vocabulary is split in the embedding and in the head's cross-entropy. What remains is held by every rank.

A fused FFN is one D x D matrix:
- without sequence parallelism its columns are split: the input is cut locally, one all-reduce adds the parts;
- with sequence parallelism each rank already holds T / tp positions, so the whole matrix is applied to them with no
  communication of activations, and only its gradient is summed over ranks, once a step; where a step has fewer tokens
  than the matrix has rows, or memory matters more, its columns are split: positions are exchanged for features and the
  parts added into positions.

Under sequence parallelism a parameter that every rank holds sees only that rank's positions, and what belongs to a
column-split matrix as a whole (alpha, beta where it is on the diagonal, the gain of weight normalization) only that
rank's columns: its gradient is one part of a sum, and a hook on the gradient adds the parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.cross_entropy import VocabularyShard, linear_cross_entropy
from model.initialize import named_parameters
from model.normalized_weights import SpectralNormalization, WeightNormalization
from model.transformer import Block, Embedding, Head, Transformer
from parallel.config import HEAD_SHARDED, sees_part
from parallel.deepspeed_internals import whole_shape
from parallel.sharding import megatron
from parallel.sharding.collectives import gather_positions, name_of, sum_both_ways, take_positions
from parallel.sharding.exchange import features_for_positions
from parallel.sharding.megatron import Groups


def apply_tensor_parallel(
    model: Transformer, groups: Groups, sequence_parallel: bool, replicate_fused_ffn: bool
) -> dict[str, int]:
    """Replaces layers by their sharded forms, weights uninitialized.

    Args:
        replicate_fused_ffn: whether every rank keeps a fused FFN whole; only under sequence parallelism.

    Returns:
        The dimension along which each split parameter is split, by global name.
    """
    if groups.grid.tp == 1:
        return {}
    split: dict[int, int] = {}
    if model.embedding is not None:
        _split_embedding(model.embedding, groups, sequence_parallel)
        split[id(model.embedding.word.weight)] = 0
    for block in model.layers.values():
        split.update(_split_block(block, groups, sequence_parallel, replicate_fused_ffn))
    if model.head is not None:
        model.head = VocabularyParallelHead(model.head, groups, sequence_parallel)
        model.tie_head()
        split[id(model.head.weight)] = 0
    return {name: split[id(parameter)] for name, parameter in named_parameters(model) if id(parameter) in split}


def mark_split(model: Transformer, split: dict[str, int]) -> None:
    """Marks every parameter: `partition_dim` is the split dimension or None; DeepSpeed's norms go by
    `tensor_model_parallel`.
    """
    for name, parameter in named_parameters(model):
        parameter.partition_dim = split.get(name)
        parameter.tensor_model_parallel = name in split


def sum_replicated_gradients(
    model: Transformer, groups: Groups, sequence_parallel: bool, num_micro_batches: int
) -> None:
    """Adds up gradients of parameters that every tensor-parallel rank holds but sees only in part, once a step.

    `sees_part` says which. Call once parameters are final.
    """
    if groups.grid.tp == 1:
        return
    for name, parameter in named_parameters(model):
        if parameter.partition_dim is None and sees_part(name, model.config, sequence_parallel):
            parameter.register_hook(_SumOncePerStep(groups.tensor, num_micro_batches))


class _SumOncePerStep:
    """A gradient hook: holds the gradients of a step's micro-batches back and gives their sum over ranks with the last.

    Held in float32 or wider: a micro-batch's gradient may be small beside the sum.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, num_micro_batches: int) -> None:
        self.group, self.num_micro_batches = group, num_micro_batches
        self.count = 0
        self.held: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        self.count += 1
        exact = torch.promote_types(grad.dtype, torch.float32)
        if self.count < self.num_micro_batches:
            self.held = grad.to(exact, copy=True) if self.held is None else self.held.add_(grad)
            return torch.zeros_like(grad)
        total = grad if self.held is None else self.held.add_(grad).to(grad.dtype)
        self.count, self.held = 0, None
        return _all_reduced(total, self.group)


def cut(model: Transformer, groups: Groups) -> Callable[[str, Tensor], Tensor]:
    """A function from a whole tensor, by global name, to the shard that this rank holds (padding rows left out)."""
    parameters = dict(named_parameters(model))

    def shard(name: str, whole: Tensor) -> Tensor:
        dim = parameters[name].partition_dim
        if dim is None:
            return whole
        size = whole_shape(parameters[name])[dim]
        start = min(size * groups.grid.tp_rank, whole.shape[dim])
        return whole.narrow(dim, start, min(size, whole.shape[dim] - start))

    return shard


class VocabularyParallelHead(Head):
    """The head with the rows of its weight split over tensor-parallel ranks."""

    def __init__(self, head: Head, groups: Groups, sequence_parallel: bool) -> None:
        nn.Module.__init__(self)
        self.vocab_size, self.norm = head.vocab_size, head.norm
        rows = head.weight.shape[0] // groups.grid.tp
        self.weight = nn.Parameter(torch.empty(rows, head.weight.shape[1], device=head.weight.device))
        self.shard = VocabularyShard(
            start=rows * groups.grid.tp_rank,
            maximum=partial(_all_reduced, group=groups.tensor, op=torch.distributed.ReduceOp.MAX),
            sum=partial(_all_reduced, group=groups.tensor),
        )
        self.enter: Callable[[Tensor], Tensor] = partial(megatron.copy_to_tensor_region, groups=groups)
        if sequence_parallel:
            self.enter = partial(gather_positions, group=name_of(groups.tensor))

    def forward(self, x_TBD: Tensor, labels_TB: Tensor | None = None) -> Tensor:
        """The summed cross-entropy, equal on every rank; logits are never whole, so labels are required."""
        assert labels_TB is not None, "a vocabulary-parallel head computes losses only"
        x_TBD = self.enter(self.norm(x_TBD))
        return linear_cross_entropy(x_TBD, self.weight, labels_TB, vocab_size=self.vocab_size, shard=self.shard)


def _split_embedding(embedding: Embedding, groups: Groups, sequence_parallel: bool) -> None:
    embedding.word = megatron.vocab_parallel_embedding(embedding.word, groups)
    if sequence_parallel:
        scatter = partial(take_positions, group=name_of(groups.tensor))
        embedding.register_forward_hook(lambda module, inputs, x_TBD: scatter(x_TBD))


def _split_block(block: Block, groups: Groups, sequence_parallel: bool, replicate_fused_ffn: bool) -> dict[int, int]:
    """Shards one block and returns the split dimension of each split parameter by its id."""
    attention, ffn, split = block.attention, block.ffn, {}

    def replace(parent: nn.Module, name: str, layer: nn.Module, dim: int) -> None:
        _move_normalization(getattr(parent, name), layer, dim, groups)
        setattr(parent, name, layer)
        split.update({id(parameter): dim for parameter in layer.parameters() if parameter.dim() == 2})
        split.update({id(p): 0 for n, p in layer.named_parameters() if n.endswith("gain") and dim == 0})

    column = partial(megatron.column_parallel, groups=groups, sequence_parallel=sequence_parallel)
    row = partial(megatron.row_parallel, groups=groups, sequence_parallel=sequence_parallel, input_is_parallel=True)
    replace(attention, "query_key_value", column(attention.query_key_value), 0)
    replace(attention, "output", row(attention.output), 1)
    if ffn.fused is None:
        replace(ffn, "up", column(ffn.up), 0)
        replace(ffn, "down", row(ffn.down), 1)
    elif not replicate_fused_ffn:
        replace(ffn, "fused", row(ffn.fused, input_is_parallel=sequence_parallel), 1)
        if sequence_parallel:
            exchange = partial(features_for_positions, group=name_of(groups.tensor), ranks=groups.grid.tp)
            ffn.fused.register_forward_pre_hook(lambda module, inputs: exchange(*inputs))
    for name in HEAD_SHARDED:
        parameter = getattr(attention, name)
        if parameter is not None:
            local = nn.Parameter(torch.empty_like(parameter.chunk(groups.grid.tp)[0]))
            setattr(attention, name, local)
            split[id(local)] = 0
    return split


def _move_normalization(old: nn.Module, new: nn.Module, dim: int, groups: Groups) -> None:
    """Registers on a sharded layer the normalization that the whole one had, with the sums over shards that it
    needs.
    """
    if not parametrize.is_parametrized(old, "weight"):
        return
    before = old.parametrizations["weight"][0]
    rows, columns = new.weight.shape
    shape: dict[str, Any] = {"slots": before.slots, "normalized": before.normalized, "head_width": before.head_width}
    total = partial(sum_both_ways, group=name_of(groups.tensor))
    sums: dict[str, Any] = {"sum_over_row_shards" if dim == 0 else "sum_over_column_shards": total}
    after: nn.Module
    if isinstance(before, SpectralNormalization):
        after = SpectralNormalization(rows, columns, **shape, **sums)
    else:
        after = WeightNormalization(rows, **shape, **(sums if dim == 1 else {}))
    parametrize.register_parametrization(new, "weight", after, unsafe=True)


def _all_reduced(
    x: Tensor,
    group: torch.distributed.ProcessGroup,
    op: torch.distributed.ReduceOp.RedOpType = torch.distributed.ReduceOp.SUM,
) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, op=op, group=group)
    return x
