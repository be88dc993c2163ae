"""The one table of how tensor parallelism shards each parameter.

Everything that needs to know reads `ShardingPlan`: the layers that replace a model's own (`parallel.sharding.tensor`),
initialization and checkpoints (through `partition_dim`, which `mark_split` sets), gradient hooks, norms, and the counts
of `parallel.counting`. A new parameter of the model needs a row in `TABLE`; without one every use raises.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from model.config import ModelConfig
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class ShardingPlan:
    """How the tensor-parallel ranks of one run hold each parameter.

    Attributes:
        model: resolved sizes and ingredients.
        tp: tensor-parallel ranks; with one nothing is split.
        sequence_parallel: whether activations between tensor-parallel regions are divided by position.
        replicates_fused_ffn: whether every rank holds a fused FFN whole, which sequence parallelism allows.
    """

    model: ModelConfig
    tp: int
    sequence_parallel: bool
    replicates_fused_ffn: bool

    def split_dim(self, name: str) -> int | None:
        """Return the dimension along which ranks split a parameter, or None if each holds it whole.

        Args:
            name: global name, such as 'layers.3.ffn.alpha'.

        Raises:
            LookupError: the parameter has no row in `TABLE`.
        """
        row = _row(name)
        return None if self.tp == 1 or row.whole_if(self) else row.split

    def has_partial_gradient(self, name: str) -> bool:
        """Return whether each rank computes only a part of the gradient of a parameter that it holds whole.

        The parts must be summed over tensor-parallel ranks. A split parameter's shard has its whole gradient.

        Raises:
            LookupError: the parameter has no row in `TABLE`.
        """
        return self.tp > 1 and self.split_dim(name) is None and _row(name).partial_if(self)


def sharding_plan(model: ModelConfig, parallel: ParallelConfig, tp: int, tokens_per_step: int) -> ShardingPlan:
    """Return the plan of a run.

    Args:
        tokens_per_step: of one replica, over all its micro-batches; they decide how a fused FFN is held.
    """
    replicated = tp == 1 or parallel.replicates_fused_ffn(model.hidden_size, tokens_per_step)
    return ShardingPlan(model, tp, parallel.sequence_parallel, replicated)


Condition = Callable[[ShardingPlan], bool]


def _always(plan: ShardingPlan) -> bool:
    return True


def _never(plan: ShardingPlan) -> bool:
    return False


def _sequence_parallel(plan: ShardingPlan) -> bool:
    """Each rank sees its own positions only."""
    return plan.sequence_parallel


def _replicated(plan: ShardingPlan) -> bool:
    return plan.replicates_fused_ffn


def _on_the_diagonal(plan: ShardingPlan) -> bool:
    """Beta is then the diagonal of a matrix of which each rank holds some columns."""
    return plan.sequence_parallel or plan.model.ffn_holds_residual


@dataclass(frozen=True)
class _Row:
    split: int | None = None
    whole_if: Condition = _never
    partial_if: Condition = _never  # of a parameter that is held whole


TABLE = {
    # The vocabulary is split by rows.
    "embedding.word.weight": _Row(split=0),
    "head.weight": _Row(split=0),
    # Positions are divided after the embedding, so every rank sees all of them here.
    "embedding.position.weight": _Row(),
    # Norms run on the positions that a rank holds.
    "attention_norm.weight": _Row(partial_if=_sequence_parallel),
    "attention_norm.bias": _Row(partial_if=_sequence_parallel),
    "ffn_norm.weight": _Row(partial_if=_sequence_parallel),
    "ffn_norm.bias": _Row(partial_if=_sequence_parallel),
    "head.norm.weight": _Row(partial_if=_sequence_parallel),
    "head.norm.bias": _Row(partial_if=_sequence_parallel),
    # Heads are split, and everything of a head goes with it: rows here, columns of the output matrix.
    "attention.query_key_value.weight": _Row(split=0),
    "attention.query_key_value.gain": _Row(split=0),
    "attention.query_key_value.gamma": _Row(partial_if=_always),  # of queries, of keys: each rank has its own heads'
    "attention.query_bias": _Row(split=0),
    "attention.key_bias": _Row(split=0),
    "attention.temperature_parameter": _Row(split=0),
    "attention.threshold": _Row(split=0),
    "attention.output.weight": _Row(split=1),
    # Added to the sum over ranks, of the positions that a rank holds.
    "attention.output_bias": _Row(partial_if=_sequence_parallel),
    # What belongs to all columns of a column-split matrix gets from each rank the part of its columns.
    "attention.output.gain": _Row(partial_if=_always),
    "attention.output.gamma": _Row(partial_if=_always),
    # The FFN's hidden features are split.
    "ffn.up.weight": _Row(split=0),
    "ffn.up.gain": _Row(split=0),
    "ffn.up_bias": _Row(split=0),
    "ffn.up.gamma": _Row(partial_if=_always),
    "ffn.down.weight": _Row(split=1),
    "ffn.down.gain": _Row(partial_if=_always),
    "ffn.down.gamma": _Row(partial_if=_always),
    "ffn.fused.weight": _Row(split=1, whole_if=_replicated, partial_if=_sequence_parallel),
    "ffn.fused.gain": _Row(partial_if=_always),
    "ffn.bias": _Row(partial_if=_sequence_parallel),
    "ffn.fused.gamma": _Row(partial_if=_always),
    "ffn.alpha": _Row(partial_if=_always),
    "ffn.beta": _Row(partial_if=_on_the_diagonal),
}
"""Rows by global name without 'layers.N.'."""


def _row(name: str) -> _Row:
    kind = re.sub(r"^layers\.\d+\.", "", name)
    if kind not in TABLE:
        raise LookupError(
            f"{name} has no row in TABLE of parallel/sharding/plan.py; add one that says along which dimension "
            "tensor-parallel ranks split it and when each sees only part of its gradient"
        )
    return TABLE[kind]
