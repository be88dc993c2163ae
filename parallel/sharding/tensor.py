"""Tensor parallelism, applied from outside to a model built for one process.

`parallel.sharding.plan` says which parameters are split. Heads are split over ranks, and everything that belongs to a
head goes with it: rows of the query-key-value matrix, columns of the output matrix, biases, temperatures, thresholds.
The FFN's hidden features are split as in Megatron. The vocabulary is split in the embedding and in the head's
cross-entropy. Every rank holds the rest.

A fused FFN is one D x D matrix, held in one of two forms:
- Split by columns. Without sequence parallelism each rank takes its features of the input, and an all-reduce adds the
  parts. With it, positions are exchanged for features, and the parts are added and scattered into positions.
- Replicated, under sequence parallelism only. Each rank applies the whole matrix to its own T / tp positions. No
  activation is sent, and the matrix's gradient is summed over ranks once a step.

A parameter that every rank holds may see only part of its gradient on each. Under sequence parallelism the rank has
only its own positions. What belongs to a column-split matrix as a whole (alpha, beta on the diagonal, gains of
normalized weights) has only the rank's own columns. The parts are summed once a step, by the optimizer
(`parallel.engine.sharded_adam`), or by a hook on the gradient under DeepSpeed's own optimizers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.cross_entropy import VocabularyShard, linear_cross_entropy
from model.initialize import TIED_HEAD_SOURCE, named_parameters
from model.normalized_weights import SpectralNormalization, WeightNormalization
from model.transformer import Block, Embedding, Head, Linear, Transformer, global_shapes
from parallel.deepspeed_internals import count_every_shard, whole_shape
from parallel.sharding import megatron
from parallel.sharding.collectives import gather_positions, name_of, sum_both_ways, take_positions
from parallel.sharding.exchange import features_for_positions
from parallel.sharding.megatron import Groups
from parallel.sharding.plan import ShardingPlan


def apply_tensor_parallel(model: Transformer, groups: Groups, plan: ShardingPlan) -> None:
    """Replace layers by the sharded forms that the plan asks for; their weights are uninitialized."""
    if plan.tp == 1:
        return
    if model.embedding is not None:
        _split_embedding(model.embedding, groups, plan.sequence_parallel)
    for layer, block in model.layers.items():
        _split_block(f"layers.{layer}", block, groups, plan)
    if model.head is not None:
        model.head = VocabularyParallelHead(model.head, groups, plan.sequence_parallel)
        model.tie_head()


def mark_split(model: Transformer, plan: ShardingPlan, padded_vocab_size: int) -> None:
    """Mark every parameter with the plan's split, after asserting that its layer holds just that share.

    `partition_dim` is the split dimension or None, `has_partial_gradient` the plan's answer. DeepSpeed's gradient norm
    gets a mark of its own.

    Args:
        plan: of the run.
        padded_vocab_size: rows of the whole embedding.
    """
    shapes = global_shapes(plan.model, padded_vocab_size)
    for name, parameter in named_parameters(model):
        dim = plan.split_dim(name)
        expected = list(shapes[TIED_HEAD_SOURCE if name == "head.weight" and plan.model.tied_head else name])
        if dim is not None:
            expected[dim] //= plan.tp
        assert list(parameter.shape) == expected, (
            f"{name} has shape {list(parameter.shape)} here, and parallel/sharding/plan.py says {expected} (split "
            f"dimension {dim}, tp={plan.tp}); its layer or its row is wrong"
        )
        parameter.partition_dim, parameter.has_partial_gradient = dim, plan.has_partial_gradient(name)
        count_every_shard(parameter, is_split=dim is not None)


def sum_replicated_gradients(model: Transformer, groups: Groups, num_micro_batches: int) -> None:
    """Sum partial gradients over tensor-parallel ranks once a step, by hooks; call once parameters are final."""
    for parameter in model.parameters():
        if parameter.has_partial_gradient:
            parameter.register_hook(_SumOncePerStep(groups.tensor, num_micro_batches))


class _SumOncePerStep:
    """A gradient hook that sums over micro-batches and ranks with one all-reduce a step.

    It returns zero for all micro-batches but the last, for which it returns the whole sum. The sum is kept in float32
    or wider, since one micro-batch's gradient may be small beside it.
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
    """Return a function (global name, whole tensor) -> the shard that this rank holds, without padding rows."""
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
    """The head with its weight split by rows over tensor-parallel ranks."""

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
        """Return the summed cross-entropy, equal on every rank; labels are required, since logits are never whole."""
        assert labels_TB is not None, "a vocabulary-parallel head computes losses only"
        x_TBD = self.enter(self.norm(x_TBD))
        return linear_cross_entropy(x_TBD, self.weight, labels_TB, vocab_size=self.vocab_size, shard=self.shard)


def _split_embedding(embedding: Embedding, groups: Groups, sequence_parallel: bool) -> None:
    embedding.word = megatron.vocab_parallel_embedding(embedding.word, groups)
    if sequence_parallel:
        scatter = partial(take_positions, group=name_of(groups.tensor))
        embedding.register_forward_hook(lambda module, inputs, x_TBD: scatter(x_TBD))


def _split_block(name: str, block: Block, groups: Groups, plan: ShardingPlan) -> None:
    """Replace a block's linear layers and per-head vectors by this rank's shards."""
    linears = [(path, module) for path, module in block.named_modules() if isinstance(module, Linear)]
    for path, linear in linears:
        dim = plan.split_dim(f"{name}.{path}.weight")
        if dim is None:
            continue
        layer: nn.Module
        if dim == 0:
            layer = megatron.column_parallel(linear, groups, plan.sequence_parallel)
        else:
            # A fused FFN's input has all features. Under sequence parallelism an exchange gives each rank its own.
            takes_features = path != "ffn.fused" or plan.sequence_parallel
            layer = megatron.row_parallel(linear, groups, plan.sequence_parallel, input_is_parallel=takes_features)
        _move_normalization(linear, layer, dim, groups)
        parent, _, attribute = path.rpartition(".")
        setattr(block.get_submodule(parent), attribute, layer)
        if path == "ffn.fused" and plan.sequence_parallel:
            exchange = partial(features_for_positions, group=name_of(groups.tensor), ranks=plan.tp)
            layer.register_forward_pre_hook(lambda module, inputs, exchange=exchange: exchange(*inputs))
    for part in ("attention", "ffn"):
        module = block.get_submodule(part)
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if plan.split_dim(f"{name}.{part}.{attribute}") == 0:
                setattr(module, attribute, nn.Parameter(torch.empty_like(parameter.chunk(plan.tp)[0])))


def _move_normalization(old: nn.Module, new: nn.Module, dim: int, groups: Groups) -> None:
    """Register on a sharded layer the normalization of the whole one, with the sums over shards that it needs."""
    if not parametrize.is_parametrized(old, "weight"):
        return
    before = old.parametrizations["weight"][0]
    rows, columns = new.weight.shape
    shape: dict[str, Any] = {"slots": before.slots, "normalized": before.normalized, "head_width": before.head_width}
    total = partial(sum_both_ways, group=name_of(groups.tensor))
    sums: dict[str, Any] = {"sum_over_row_shards" if dim == 0 else "sum_over_column_shards": total}
    after: nn.Module
    if isinstance(before, SpectralNormalization):
        after = SpectralNormalization(rows, columns, **shape, has_gain=before.gamma is not None, **sums)
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
