"""The only file that imports megatron-core: process groups and tensor-parallel layers.

The layers keep megatron-core's shards and shapes. They compute and communicate through `parallel.sharding.products`
instead of megatron-core's autograd functions, through which torch 2.11 loses gradients when a block is compiled.

Importing this file checks everything that it uses of megatron-core against the installed version.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.transformer import scaled_matrix
from parallel import libraries
from parallel.grid import RankGrid
from parallel.sharding.collectives import name_of, take_features
from parallel.sharding.products import column_linear, row_linear

LIBRARY = "megatron-core"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it names optional packages that are not needed here
    try:
        import megatron.core
        from megatron.core import parallel_state
        from megatron.core import tensor_parallel as mcore
    except ImportError as error:
        raise libraries.LibraryChangedError(LIBRARY, f"cannot be imported ({error})") from error


def check_installed() -> None:
    """Check that the installed megatron-core has everything that this file uses.

    Raises:
        LibraryChangedError: it lacks something, or takes other arguments.
    """
    takes = functools.partial(libraries.require_arguments, LIBRARY)
    assigned = functools.partial(libraries.require_assigned, LIBRARY)
    sizes = "tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size"
    takes(parallel_state, "initialize_model_parallel", keywords=f"{sizes}, create_gloo_process_groups")
    for axis in ("tensor_model_parallel", "context_parallel", "pipeline_model_parallel", "model_parallel"):
        libraries.require(LIBRARY, parallel_state, f"get_{axis}_group")
    takes(parallel_state, "get_data_parallel_group", keywords="with_context_parallel")
    takes(parallel_state, "get_embedding_group", keywords="check_initialized")
    takes(mcore, "ColumnParallelLinear", "input_size, output_size", "config, init_method, bias, tp_group")
    assigned(mcore.ColumnParallelLinear, "weight", "sequence_parallel")
    row = "config, init_method, bias, input_is_parallel, skip_bias_add, tp_group"
    takes(mcore, "RowParallelLinear", "input_size, output_size", row)
    assigned(mcore.RowParallelLinear, "weight", "sequence_parallel", "input_is_parallel", "input_size_per_partition")
    takes(mcore, "VocabParallelEmbedding", "num_embeddings, embedding_dim", "init_method, config, tp_group")
    assigned(mcore.VocabParallelEmbedding, "weight")
    takes(mcore, "copy_to_tensor_model_parallel_region", "input_", "group")
    flags = "sequence_parallel, use_cpu_initialization, perform_initialization, gradient_accumulation_fusion"
    takes(megatron.core, "ModelParallelConfig", keywords=f"tensor_model_parallel_size, {flags}")


check_installed()


@dataclass(frozen=True)
class Groups:
    """The grid, and this rank's process group along each axis.

    Attributes:
        grid: with this rank's place in it.
        tensor: ranks that share each layer.
        context: other positions of the same sequences.
        batch: the same positions of other sequences.
        data: `context` and `batch` together, the replicas that gradients are averaged over.
        pipeline: the stages of one pipeline.
        tensor_pipeline: all ranks of one replica.
    """

    grid: RankGrid
    tensor: ProcessGroup
    context: ProcessGroup
    batch: ProcessGroup
    data: ProcessGroup
    pipeline: ProcessGroup
    tensor_pipeline: ProcessGroup

    @property
    def embedding_ends(self) -> ProcessGroup | None:
        """First and last stage of this rank's pipeline, which share a tied embedding; None on middle stages."""
        return parallel_state.get_embedding_group(check_initialized=False)


def initialize_groups(grid: RankGrid) -> Groups:
    """Create every process group of the grid; torch.distributed must be initialized."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        context_parallel_size=grid.cp,
        create_gloo_process_groups=False,
    )
    return Groups(
        grid=grid,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        batch=parallel_state.get_data_parallel_group(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        tensor_pipeline=parallel_state.get_model_parallel_group(),
    )


class ModelParallelUnit:
    """megatron-core's `parallel_state`, completed to the `mpu` that DeepSpeed expects.

    DeepSpeed sees every replica as a data-parallel rank, whether it holds other sequences or other positions.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._groups.tensor_pipeline

    def get_model_parallel_world_size(self) -> int:
        return self._groups.grid.tp * self._groups.grid.pp

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._groups.tensor_pipeline)

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._groups.data

    def get_data_parallel_world_size(self) -> int:
        return self._groups.grid.replicas

    def get_data_parallel_rank(self) -> int:
        return self._groups.grid.replica

    def get_data_parallel_group_ranks(self) -> list[int]:
        grid = self._groups.grid
        return [int(rank) for rank in grid.ranks[grid.stage, :, :, grid.tp_rank].flatten()]


class ColumnParallelLinear(mcore.ColumnParallelLinear):
    """Y = X W^T with the rows of W split: Y = [X W_1^T .. X W_p^T]; each rank keeps its part of Y."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return this rank's part of Y; the bias is that part's."""
        y: Tensor = column_linear(x, self.weight, bias, self.group_name, self.sequence_parallel)
        return y


class RowParallelLinear(mcore.RowParallelLinear):
    """Y = X W^T with the columns of W split: Y = sum_i X_i W_i^T, summed over ranks."""

    def forward(self, x: Tensor, divisor: Tensor | None = None, diagonal: Tensor | float | None = None) -> Tensor:
        """Return Y, or its positions of this rank under sequence parallelism.

        Args:
            x: this rank's features, or all features if `input_is_parallel` is false.
            divisor: of the whole matrix; each rank gets a part of its gradient.
            diagonal: of the whole matrix; each rank gets a part of its gradient.
        """
        if not self.input_is_parallel:
            x = take_features(x, self.group_name)
        matrix = scaled_matrix(self.weight, divisor, diagonal, self.first_column)
        y: Tensor = row_linear(x, matrix, self.group_name, self.sequence_parallel)
        return y


def column_parallel(linear: nn.Linear, groups: Groups, sequence_parallel: bool) -> ColumnParallelLinear:
    """Return the column-parallel form of a bias-free linear layer; its weight is uninitialized."""
    shared = _linear_arguments(groups, sequence_parallel)
    layer = ColumnParallelLinear(linear.in_features, linear.out_features, **shared)
    layer.group_name = name_of(groups.tensor)
    return layer


def row_parallel(
    linear: nn.Linear, groups: Groups, sequence_parallel: bool, input_is_parallel: bool
) -> RowParallelLinear:
    """Return the row-parallel form of a bias-free linear layer; its weight is uninitialized.

    Args:
        input_is_parallel: whether the input holds only this rank's features.
    """
    shared = {**_linear_arguments(groups, sequence_parallel), "input_is_parallel": input_is_parallel}
    layer = RowParallelLinear(linear.in_features, linear.out_features, **shared, skip_bias_add=False)
    layer.group_name, layer.first_column = name_of(groups.tensor), groups.grid.tp_rank * layer.input_size_per_partition
    return layer


def vocab_parallel_embedding(embedding: nn.Embedding, groups: Groups) -> nn.Module:
    """Return the vocabulary-parallel form of a word embedding; its weight is uninitialized."""
    return mcore.VocabParallelEmbedding(
        embedding.num_embeddings,
        embedding.embedding_dim,
        init_method=nn.init.normal_,
        config=_layer_config(groups, False),
        tp_group=groups.tensor,
    )


def copy_to_tensor_region(x: Tensor, groups: Groups) -> Tensor:
    """Return x; the backward pass sums its gradient over tensor-parallel ranks."""
    return mcore.copy_to_tensor_model_parallel_region(x, group=groups.tensor)


def _linear_arguments(groups: Groups, sequence_parallel: bool) -> dict[str, Any]:
    """Return the arguments that column- and row-parallel layers share."""
    return {
        "config": _layer_config(groups, sequence_parallel),
        "init_method": nn.init.normal_,
        "bias": False,
        "tp_group": groups.tensor,
    }


def _layer_config(groups: Groups, sequence_parallel: bool) -> Any:
    return megatron.core.ModelParallelConfig(
        tensor_model_parallel_size=groups.grid.tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
