"""Count the bytes that collectives send, by the axis of the grid whose group they run over.

    with TrafficCounter(groups) as traffic:
        engine.train_step(...)
    traffic.bytes["tensor"]

Bytes are those that one rank sends under ring algorithms, for n ranks and a tensor of s bytes:

    all-reduce                                           2 s (n-1)/n
    reduce-scatter, all-to-all, all-gather (result s)      s (n-1)/n
    broadcast, point to point                              s
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.sharding.collectives import IMPLEMENTATIONS, NAMESPACE
from parallel.sharding.megatron import Groups

AXES = ("tensor", "context", "batch", "data", "pipeline", "tensor_pipeline", "embedding_ends")
ALL_REDUCES = ("allreduce_", "allreduce_coalesced_", "reduce_")
GATHERS = ("_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_")
SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
EXCHANGES = ("alltoall_base_", "alltoall_")
COPIES = ("broadcast_", "send")


class TrafficCounter(TorchDispatchMode):
    """Counts this rank's `bytes` and `calls` by axis; a group that is no axis of the grid counts as 'other'.

    Only the averaged entropies run over `batch`.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        held = {axis: group for axis in AXES if (group := getattr(groups, axis)) is not None}
        self._axis = {group.group_name: axis for axis, group in held.items()}
        # DeepSpeed's pipeline makes its own groups, known by their ranks. `batch` is left out: only entropies use it.
        self._by_ranks = {_ranks(group): axis for axis, group in held.items() if axis != "batch"}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == NAMESPACE:  # entered again, or the collectives inside would not be counted
            with self:
                return IMPLEMENTATIONS[operator._schema.name](*args, **(kwargs or {}))
        if operator.namespace == "c10d":
            self._count(operator._schema.name.split("::")[1], args)
        return operator(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next((unboxed for arg in args if (unboxed := _process_group(arg)) is not None), None)
        if group is None or group.size() == 1:
            return
        ranks = group.size()
        share = {
            **dict.fromkeys(ALL_REDUCES, 2 * (ranks - 1) / ranks),
            **dict.fromkeys(GATHERS + SCATTERS + EXCHANGES, (ranks - 1) / ranks),
            **dict.fromkeys(COPIES, 1.0),
        }.get(name)
        if share is None:
            return  # barriers, receives
        # The first two arguments are outputs and inputs. Gathers have larger outputs, scatters larger inputs.
        size = max(_size_bytes(arg) for arg in args[:2])
        axis = "pipeline" if name == "send" else self._axis.get(group.group_name)
        axis = axis or self._by_ranks.get(_ranks(group), "other")
        self.bytes[axis] += round(share * size)
        self.calls[axis] += 1


def _process_group(argument: Any) -> Any:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:
        return None  # a reduction's operator


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _size_bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
