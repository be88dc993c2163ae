"""Bugs to put into the sharding code one at a time; the comparison with one process must notice each of them."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch


def pipe_partitioned() -> Any:
    """DeepSpeed partitions activations between stages by default, which sequence parallelism has done already."""
    from parallel.engine import engine

    real = engine.deepspeed_config

    def without_pipeline(*args: Any) -> dict[str, Any]:
        config = real(*args)
        del config["pipeline"]
        return config

    return mock.patch.object(engine, "deepspeed_config", without_pipeline)


def replicated_gradients_not_summed() -> Any:
    return mock.patch("parallel.engine.engine.sum_replicated_gradients", lambda *args: None)


def replicated_gradients_summed_of_the_last_micro_batch() -> Any:
    """The hook returns only the last micro-batch's gradient."""
    from parallel.sharding import tensor

    real = tensor._SumOncePerStep.__call__

    def forgetful(self: Any, grad: torch.Tensor) -> torch.Tensor:
        self.held = None
        return real(self, grad)

    return mock.patch.object(tensor._SumOncePerStep, "__call__", forgetful)


def split_parameters_not_marked() -> Any:
    """DeepSpeed then counts only one rank's shard in the gradient norm."""
    from parallel.sharding import stage

    real = stage.mark_split

    def mark(model: Any, *args: Any) -> None:
        real(model, *args)
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False

    return mock.patch.object(stage, "mark_split", mark)


def tied_copies_not_summed() -> Any:
    return mock.patch("parallel.engine.pipeline.PipelineStage.get_tied_weights_and_groups", lambda self: [])


def tied_copy_counted_twice() -> Any:
    from parallel.engine import pipeline

    real = pipeline.PipelineStage.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    return mock.patch.object(pipeline.PipelineStage, "__init__", init)


def regularizer(**wrong: Callable[[Any], Any]) -> Any:
    """The sharded regularizer, with some of its attributes computed otherwise."""
    from parallel.sharding.regularizer import ShardedRegularizer

    real = ShardedRegularizer.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        real(self, *args, **named)
        for name, compute in wrong.items():
            setattr(self, name, compute(self))

    return mock.patch.object(ShardedRegularizer, "__init__", init)


def penalty_not_divided_by_micro_batches() -> Any:
    return regularizer(gradient_scale=lambda self: 1.0)


def context_ranks_averaged_not_summed() -> Any:
    return regularizer(factor=lambda self: self.factor / self.groups.grid.cp)


def local_heads_as_global() -> Any:
    return regularizer(factor=lambda self: self.factor * self.groups.grid.tp)


def local_layers_as_global() -> Any:
    return regularizer(factor=lambda self: self.factor * self.groups.grid.pp)


def thresholds_of_other_heads() -> Any:
    return regularizer(own_heads=lambda self: slice(0, self.own_heads.stop - self.own_heads.start))


def mean_entropy_not_reduced() -> Any:
    from parallel.sharding import regularizer as module

    def local_only(self: Any, local: torch.Tensor, groups: Any) -> None:
        self._mean, self._work = local, None

    return mock.patch.object(module._Average, "__init__", local_only)


def causal_targets_of_the_packed_sequence() -> Any:
    """Targets ignore where documents start."""
    from parallel.sharding import regularizer as module

    real = module.reachable_entropy
    return mock.patch.object(
        module, "reachable_entropy", lambda config, length, entropy, _: real(config, length, entropy)
    )


def temperatures_of_other_heads() -> Any:
    """Every context-parallel rank takes the first rank's temperatures."""
    from parallel.sharding import context

    real = context.ContextParallelCore.forward

    def forward(self: Any, qkv: Any, temperature: Any, document_start: Any = None) -> Any:
        if temperature is not None:
            temperature = torch.cat([temperature.chunk(self.ranks)[0]] * self.ranks)
        return real(self, qkv, temperature, document_start)

    return mock.patch.object(context.ContextParallelCore, "forward", forward)


def every_context_rank_at_position_zero() -> Any:
    from parallel.sharding import stage

    real = stage.apply_context_parallel

    def apply(model: Any, groups: Any) -> None:
        real(model, groups)
        if model.embedding is not None:
            model.embedding.first_position = 0

    return mock.patch.object(stage, "apply_context_parallel", apply)


def head(**wrong: Callable[[Any], Any]) -> Any:
    """The vocabulary-parallel head, with some attributes of its shard computed otherwise."""
    from parallel.sharding.tensor import VocabularyParallelHead

    real = VocabularyParallelHead.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.shard = replace(self.shard, **{name: compute(self.shard) for name, compute in wrong.items()})

    return mock.patch.object(VocabularyParallelHead, "__init__", init)


def vocabulary_not_summed() -> Any:
    return head(sum=lambda shard: lambda local: local)


def vocabulary_of_a_neighbour() -> Any:
    return head(start=lambda shard: shard.start - (shard.start > 0))


def diagonal_of_the_first_columns() -> Any:
    """Every rank puts beta where the first rank has the matrix's diagonal."""
    from model.transformer import scaled_matrix

    def everywhere(weight: Any, divisor: Any, diagonal: Any, first_column: int) -> torch.Tensor:
        return scaled_matrix(weight, divisor, diagonal)

    return mock.patch("parallel.sharding.megatron.scaled_matrix", everywhere)


def diagonal_taken_for_whole() -> Any:
    """Each rank keeps the part of beta's gradient that comes from its own columns."""
    from parallel.sharding.plan import ShardingPlan

    real = ShardingPlan.has_partial_gradient

    def has_partial_gradient(self: Any, name: str) -> bool:
        return real(self, name) and not name.endswith("ffn.beta")

    return mock.patch.object(ShardingPlan, "has_partial_gradient", has_partial_gradient)


def features_of_other_ranks() -> Any:
    from parallel.sharding.exchange import heads_for_positions

    def exchange(x_TBD: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
        return heads_for_positions(x_TBD.unflatten(-1, (ranks, -1)).flip(2), group, ranks).flatten(2)

    return mock.patch("parallel.sharding.tensor.features_for_positions", exchange)


def micro_batches_before_the_last_but_one_forgotten() -> Any:
    from parallel.sharding import tensor

    real = tensor._SumOncePerStep.__call__

    def forgetful(self: Any, grad: torch.Tensor) -> torch.Tensor:
        if self.count + 1 < self.num_micro_batches:
            self.held = None
        return real(self, grad)

    return mock.patch.object(tensor._SumOncePerStep, "__call__", forgetful)


def documents_begin_at_zero_on_later_stages() -> Any:
    from parallel.engine import pipeline

    real = pipeline.PipelineStage.forward

    def forward(self: Any, x: Any) -> Any:
        handed = real(self, x)
        return (handed[0], torch.zeros_like(handed[1])) if isinstance(handed, tuple) else handed

    return mock.patch.object(pipeline.PipelineStage, "forward", forward)


def measure_with(bug: str | None, *args: Any) -> dict[str, Any]:
    """Measure on this rank like `train.compare.measurement`, with a bug of this module."""
    from train.compare import measurement

    if bug is None:
        return measurement._measure_on_rank(*args)
    with globals()[bug]():
        return measurement._measure_on_rank(*args)


def measure_losing_a_gradient(*args: Any) -> dict[str, Any]:
    """Measure on this rank; with several ranks temperatures act but get no gradient."""
    import os

    return _measure(os.environ["WORLD_SIZE"] != "1", *args)


def measure_losing_as_trained(*args: Any) -> dict[str, Any]:
    """Measure on this rank; temperatures get no gradient where one process trains, and nowhere else."""
    import os

    return _measure(os.environ["WORLD_SIZE"] == "1" and args[-1] == "configured", *args)


def _measure(loses: bool, *args: Any) -> dict[str, Any]:
    from model.transformer import Attention
    from train.compare import measurement

    temperature = Attention.temperature
    lossy = mock.patch.object(Attention, "temperature", lambda self: temperature(self).detach())
    with lossy if loses else contextlib.nullcontext():
        return measurement._measure_on_rank(*args)


def measure_never_compiled(*args: Any) -> dict[str, Any]:
    """Measure on this rank with uncompiled blocks, as when an environment variable turns the compiler off."""
    from train.compare import measurement

    with mock.patch("torch.compile", lambda function, **options: function):
        return measurement._measure_on_rank(*args)


def measure_never(*args: Any) -> dict[str, Any]:
    """Stand for a rank that fails before it has measured anything."""
    raise MemoryError("no room for the model")
