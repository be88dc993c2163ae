"""Every private name of DeepSpeed that this project reads or replaces; no other file uses one.

`check_installed` compares the names with the installed version before an engine is built. Public names (initialize,
PipelineModule, GatheredParameters) are used where they are needed, in parallel/engine/ and parallel/launch.py.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
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
    from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
    from deepspeed.utils import tensor_fragment

    require = functools.partial(libraries.require, LIBRARY)
    assigned = functools.partial(libraries.require_assigned, LIBRARY)
    optimizer = bf16_optimizer.BF16_Optimizer
    require(optimizer, "update_hp_grads", "clear_lp_grads")
    require(optimizer, "clear_hp_grads", "")
    require(optimizer, "backward_prologue", "")
    require(optimizer, "get_grads_for_norm", "for_clipping")
    assigned(optimizer, "optimizer", "bf16_groups", "fp32_groups_gradients", "fp32_groups_gradients_flat")
    assigned(optimizer, "fp32_groups_gradient_flat_partition", "fp32_groups_has_gradients", "real_dp_process_group")
    assigned(optimizer, "overflow", "_global_grad_norm")
    require(bf16_optimizer, "get_global_norm_of_tensors", "input_tensors, norm_type, mpu, moe_ep_group")
    require(bf16_optimizer, "is_invalid_grad_norm", "norm")
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


# The bf16 optimizer, which accumulates gradients in float32


@dataclass(frozen=True)
class GradientGroup:
    """The gradients of one parameter group of a `BF16_Optimizer`.

    Attributes:
        parameters: in bf16.
        totals: of each parameter, its float32 sum over micro-batches; flattened views of `flat`.
        has_gradient: of each parameter, whether its total holds a gradient of this step.
        flat: all totals in one buffer, padded.
        own: the part of `flat` whose weights this rank steps.
        replicas: ranks that average it.
    """

    parameters: list[nn.Parameter]
    totals: list[Tensor]
    has_gradient: list[bool]
    flat: Tensor
    own: Tensor
    replicas: ProcessGroup


def gradient_groups(optimizer: Any) -> list[GradientGroup]:
    """Return the gradient groups of a `BF16_Optimizer`."""
    columns = (
        optimizer.bf16_groups,
        optimizer.fp32_groups_gradients,
        optimizer.fp32_groups_has_gradients,
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
        optimizer.real_dp_process_group,
    )
    return [GradientGroup(*group) for group in zip(*columns, strict=True)]


def hand_over_gradient(parameter: nn.Parameter, total: Tensor) -> None:
    """Record the float32 sum that a parameter's bf16 gradient was added to, and release that gradient."""
    parameter._hp_grad, parameter.grad = total, None  # type: ignore[attr-defined]


def replace_accumulation(
    optimizer: Any, accumulate: Callable[..., None], begin_step: Callable[[], None], begin_backward: Callable[[], None]
) -> None:
    """Replace how a `BF16_Optimizer` accumulates gradients, forgets them after a step, and prepares a backward pass."""
    replace(optimizer, "update_hp_grads", accumulate)
    replace(optimizer, "clear_hp_grads", begin_step)
    replace(optimizer, "backward_prologue", begin_backward)


def replace_averaging(
    engine: Any, average: Callable[..., None], parts_of: Callable[[list[Tensor]], list[Tensor]]
) -> None:
    """Replace how an engine averages gradients over replicas, and of which tensors it takes the norm.

    Args:
        average: takes nothing that matters; called once a step, after the last backward pass.
        parts_of: what of the optimizer's totals counts on this rank.
    """
    get_grads_for_norm = engine.optimizer.get_grads_for_norm

    def buffered_allreduce_fallback(grads: Any = None, elements_per_buffer: int = 0) -> None:
        average()

    def own_grads_for_norm(for_clipping: bool = False) -> tuple[list[Tensor], Any]:
        assert not for_clipping, "DeepSpeed's own clipping is off"
        totals, of_experts = get_grads_for_norm()
        return parts_of(totals), of_experts

    replace(engine, "buffered_allreduce_fallback", buffered_allreduce_fallback)
    replace(engine.optimizer, "get_grads_for_norm", own_grads_for_norm)


def replace_norm(norm: Callable[[list[Tensor], bool], Tensor]) -> None:
    """Replace how bf16 optimizers take the norm of gradients; they no longer ask the device whether it is finite.

    Args:
        norm: takes the parts that count on this rank, and whether other ranks hold more.
    """
    from deepspeed.runtime import bf16_optimizer

    def get_global_norm_of_tensors(
        input_tensors: Iterable[Tensor], norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None
    ) -> Tensor:
        assert norm_type == 2 and moe_ep_group is None
        return norm(list(input_tensors), mpu is not None)

    def is_invalid_grad_norm(norm: Any) -> bool:
        return False

    replace(bf16_optimizer, "get_global_norm_of_tensors", get_global_norm_of_tensors)
    replace(bf16_optimizer, "is_invalid_grad_norm", is_invalid_grad_norm)


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


def leave_out_shared_memory() -> None:
    """Keep the CPU backend from compiling a shared-memory operator at start: 50 s, and its segments stay behind."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
