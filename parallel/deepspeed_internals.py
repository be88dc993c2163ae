"""Every private name of DeepSpeed that this project reads or replaces; no other file uses one.

`check_installed` compares the names with the installed version before an engine is built. Public names (initialize,
PipelineModule, GatheredParameters) are used where they are needed, in parallel/engine/ and parallel/launch.py.
"""

import functools
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel import libraries

LIBRARY = "deepspeed"
replace = functools.partial(libraries.replace, LIBRARY)


@functools.cache
def check_installed() -> None:
    """Check that the installed DeepSpeed has every name below.

    Raises:
        LibraryChangedError: it lacks one, or one takes other parameters.
    """
    import deepspeed.utils
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime import bf16_optimizer, config, constants, engine, utils
    from deepspeed.runtime.pipe import engine as pipe_engine
    from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
    from deepspeed.utils import tensor_fragment

    require = functools.partial(libraries.require, LIBRARY)
    assigned = functools.partial(libraries.require_assigned, LIBRARY)
    optimizer = bf16_optimizer.BF16_Optimizer
    require(optimizer, "update_hp_grads", "clear_lp_grads")
    require(optimizer, "backward_prologue", "")
    require(optimizer, "clear_lp_grads", "set_to_none")
    require(optimizer, "get_grads_for_reduction", "")
    require(optimizer, "step", "closure")
    require(optimizer, "zero_grad", "set_to_none")
    assigned(optimizer, "optimizer", "bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition")
    assigned(optimizer, "fp32_groups_gradients", "fp32_groups_gradients_flat", "fp32_groups_actual_gradients_flat")
    assigned(optimizer, "fp32_groups_gradient_flat_partition", "non_expert_gradients", "real_dp_process_group")
    assigned(optimizer, "overflow", "_global_grad_norm")
    for module in (engine, pipe_engine):
        require(module, "BF16_Optimizer", ", ".join(inspect.signature(optimizer).parameters))
    if "weight._hp_grad if self.using_bf16_optimizer" not in _source(pipe_engine.PipelineEngine):
        raise libraries.LibraryChangedError(LIBRARY, "does not sum _hp_grad of a tied weight over pipeline stages")
    require(engine.DeepSpeedEngine, "buffered_allreduce_fallback", "grads, elements_per_buffer")
    require(engine.DeepSpeedEngine, "communication_data_type")
    require(config, "DeepSpeedConfig")
    assigned(stage_1_and_2.DeepSpeedZeroOptimizer, "optimizer", "overflow", "_global_grad_norm")
    assigned(stage3.DeepSpeedZeroOptimizer_Stage3, "optimizer", "overflow", "_global_grad_norm")
    assigned(stage3.DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat")
    for attribute in ("ds_id", "ds_shape", "ds_numel", "ds_tensor"):
        if f"param.{attribute} = " not in _source(partition_parameters):
            raise libraries.LibraryChangedError(LIBRARY, f"sets no {attribute} on a partitioned parameter")
    for field in ("param_group_index", "lp_fragment_address", "hp_fragment_address", "hp_fragment"):
        if field not in tensor_fragment.__dataclass_fields__:
            raise libraries.LibraryChangedError(LIBRARY, f"has no field {field} in tensor_fragment")
    require(PipelineModule, "_synchronize_tied_weights", "")
    require(PipelineModule, "get_tied_weights_and_groups", "")
    require(deepspeed.utils, "safe_get_local_fp32_param", "param")
    require(deepspeed.utils, "safe_get_local_optimizer_state", "param, optim_state_key")
    require(utils, "is_model_parallel_parameter", "p")
    if "'tensor_model_parallel'" not in _source(utils.is_model_parallel_parameter):
        raise libraries.LibraryChangedError(LIBRARY, "does not read tensor_model_parallel of a parameter for its norms")
    if getattr(constants, "PIPE_REPLICATED", None) != "ds_pipe_replicated":
        raise libraries.LibraryChangedError(LIBRARY, "does not read ds_pipe_replicated of a parameter for its norms")


def _source(owner: Any) -> str:
    return inspect.getsource(owner)


# The optimizers around AdamW


def adam(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that a ZeRO optimizer steps."""
    return optimizer.optimizer  # type: ignore[no-any-return]


def gradient_norm(optimizer: Any) -> Tensor | float:
    """Return the global norm of the last step's gradients, before clipping; infinite if any is not finite."""
    norm = getattr(optimizer, "_global_grad_norm", None)
    return float("inf") if getattr(optimizer, "overflow", False) or norm is None else norm


def flat_masters(optimizer: Any) -> list[Tensor]:
    """Return this rank's flat float32 partitions; ZeRO-3 hands them to AdamW only while it steps."""
    groups = adam(optimizer).param_groups
    flat = [flat for group in groups for flat in group["params"]]
    return getattr(optimizer, "fp32_partitioned_groups_flat", flat)


# The bf16 optimizer, of which parallel/engine/sharded_adam.py makes a subclass


def bf16_optimizer() -> Any:
    """Return the class `BF16_Optimizer`, after checking everything that this project uses of DeepSpeed.

    Raises:
        LibraryChangedError: the installed DeepSpeed lacks something.
    """
    check_installed()
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return BF16_Optimizer


def build_instead(optimizer: type) -> None:
    """Make DeepSpeed's engines build this subclass where they would build a `BF16_Optimizer`.

    The name is replaced where engines look it up: a pipeline takes a `BF16_Optimizer` only if it is of that exact type.
    """
    from deepspeed.runtime import engine
    from deepspeed.runtime.pipe import engine as pipe_engine

    for module in (engine, pipe_engine):
        replace(module, "BF16_Optimizer", optimizer)


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group of a `BF16_Optimizer`.

    Attributes:
        parameters: in bf16; flattened they are consecutive views of `weights`.
        weights: all of them in one buffer, padded to equal parts.
        master: float32 [part], the part whose weights this rank steps.
        replicas: ranks that hold one part each, in their order in the group.
    """

    parameters: list[nn.Parameter]
    weights: Tensor
    master: Tensor
    replicas: ProcessGroup


def take_flat_groups(optimizer: Any) -> list[FlatGroup]:
    """Return the parameter groups of a `BF16_Optimizer`, and release the gradient sums that it has allocated."""
    for held in (
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_actual_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
        optimizer.non_expert_gradients,
        *optimizer.fp32_groups_gradients,  # lists that DeepSpeed has linked to the parameters
    ):
        held.clear()
    columns = (
        optimizer.bf16_groups,
        optimizer.bf16_groups_flat,
        optimizer.fp32_groups_flat_partition,
        optimizer.real_dp_process_group,
    )
    return [FlatGroup(*group) for group in zip(*columns, strict=True)]


def sum_over_stages(parameter: nn.Parameter, total: Tensor) -> None:
    """Tell DeepSpeed which float32 gradient of a tied weight it adds up over pipeline stages before a step."""
    parameter._hp_grad = total  # type: ignore[attr-defined]


def record_norm(optimizer: Any, norm: Tensor) -> None:
    """Record the global norm of a step's gradients where DeepSpeed's engine reads it."""
    optimizer._global_grad_norm = norm


# Parameters: ZeRO-1 and 2 keep whole ones and a float32 fragment of some, ZeRO-3 keeps a partition of each


@dataclass(frozen=True)
class Fragment:
    """This rank's float32 piece of a parameter that ZeRO-1 or 2 keeps whole.

    Attributes:
        start: its first element in the flattened parameter.
        master: its values, a view of the flat partition.
        group: index of the parameter group whose flat partition it lies in.
        flat_start: where in that partition, in elements.
        size: elements.
    """

    start: int
    master: Tensor
    group: int
    flat_start: int
    size: int


def fragment(parameter: nn.Parameter) -> Fragment | None:
    """Return this rank's fragment of a parameter; None if it has none."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    address = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return Fragment(start, mapping.hp_fragment, mapping.param_group_index, address.start, address.numel)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 keeps only a part of this parameter here; its own shape is then empty."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape as if ZeRO did not partition it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Partition:
    """This rank's part of a parameter under ZeRO-3.

    Attributes:
        values: [size], in the type that trains; the last part is padded.
        size: elements of every rank's part.
        whole: elements of the parameter.
    """

    values: Tensor
    size: int
    whole: int


def partition(parameter: nn.Parameter) -> Partition:
    """Return this rank's part of a partitioned parameter."""
    kept: Any = parameter
    return Partition(kept.ds_tensor, kept.ds_tensor.ds_numel, kept.ds_numel)


def partition_state(parameter: nn.Parameter, kind: str | None) -> Tensor:
    """Return the flat float32 master of this rank's part under ZeRO-3, or Adam's moment `kind` of it."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    found = safe_get_local_fp32_param(parameter) if kind is None else safe_get_local_optimizer_state(parameter, kind)
    return found.flatten()  # type: ignore[no-any-return]


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Make parameters that ZeRO-3 partitions whole while the context lasts; all ranks enter."""
    import contextlib

    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)  # type: ignore[no-any-return]


def count_every_shard(parameter: nn.Parameter, is_split: bool) -> None:
    """Tell norms of gradients whether each tensor-parallel rank's shard of this parameter counts, or only rank 0's."""
    parameter.tensor_model_parallel = is_split  # type: ignore[attr-defined]


def count_once(parameter: nn.Parameter, is_copy: bool) -> None:
    """Tell norms of gradients whether another pipeline stage's copy of this parameter counts instead."""
    parameter.ds_pipe_replicated = is_copy  # type: ignore[attr-defined]


def counts_in_norm(parameter: nn.Parameter, tensor_rank: int) -> bool:
    """Return whether this rank's gradient of a parameter counts in norms, as marked by the two functions above."""
    marked: Any = parameter
    return (marked.tensor_model_parallel or tensor_rank == 0) and not getattr(marked, "ds_pipe_replicated", False)


def leave_out_shared_memory() -> None:
    """Keep the CPU backend from compiling a shared-memory operator at start: 50 s, and its segments stay behind."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
