"""Collectives as operators: autograd and the compiler see each as one call with a registered gradient.

A collective inside a `torch.autograd.Function` cannot be compiled safely. Dynamo of torch 2.11 traces into the
function. If its forward fills a new tensor in place (`received = torch.empty_like(x)`, then a collective into it), the
result no longer requires a gradient, and everything before it silently stops learning. megatron-core's functions are of
this kind; torch 2.13 compiles them correctly. An operator is never traced into, so a block compiles as one graph with
its communication inside (`tests/parallel/sharding/test_compiled_functions.py`).

    operator            forward                                      gradient
    all_reduce          sum over ranks                               unchanged, since every rank has the whole gradient
    sum_both_ways       sum over ranks                               sum over ranks
    gather_positions    [T / p, ...] -> [T, ...]                     reduce-scatter
    scatter_sum         sum over ranks, [T, ...] -> [T / p, ...]     gather
    take_positions      this rank's rows of [T, ...]                 gather
    take_features       this rank's columns of [..., D]              gather
    all_to_all          part r of dimension 0 goes to rank r         the same exchange

Groups are passed by name, since operators take no objects; `name_of` registers a group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

NAMESPACE = "sharded"
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function that each operator runs, by the operator's full name; counting collectives needs them."""

_groups: dict[str, ProcessGroup] = {}


def name_of(group: ProcessGroup) -> str:
    """Register a process group and return the name by which the operators know it."""
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> ProcessGroup:
    """Return the group that was registered under a name."""
    return _groups[name]


def _size(group: str) -> int:
    return _groups[group].size()


def operator(function: Callable[..., Any]) -> Any:
    """Turn a function of tensors and a group's name into an operator."""
    name = f"{NAMESPACE}::{function.__name__.lstrip('_')}"
    IMPLEMENTATIONS[name] = function
    return torch.library.custom_op(name, mutates_args=())(function)


def _differentiable(operator: Any, gradient: Callable[[Tensor, str], Tensor]) -> None:
    """Register the gradient of an operator of (tensor, group)."""

    def keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    operator.register_autograd(lambda ctx, grad: (gradient(grad, ctx.group), None), setup_context=keep_group)


@operator
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum over ranks; the gradient passes through, since the layers that follow are the same on every rank."""
    return _summed(x, group)


@operator
def sum_both_ways(x: Tensor, group: str) -> Tensor:
    """Sum over ranks, and sum gradients too: each rank's own output depends on the total."""
    return _summed(x, group)


@operator
def gather_positions(x: Tensor, group: str) -> Tensor:
    """Gather all ranks' positions, [T / p, ...] -> [T, ...]."""
    whole = x.new_empty((x.shape[0] * _size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=_groups[group])
    return whole


@operator
def scatter_sum(x: Tensor, group: str) -> Tensor:
    """Sum over ranks and keep this rank's positions, [T, ...] -> [T / p, ...]."""
    own = x.new_empty((x.shape[0] // _size(group), *x.shape[1:]))
    dist.reduce_scatter_tensor(own, x.contiguous(), group=_groups[group])
    return own


@operator
def take_positions(x: Tensor, group: str) -> Tensor:
    """Keep this rank's positions of a tensor that every rank holds, [T, ...] -> [T / p, ...]."""
    return x.chunk(_size(group))[_groups[group].rank()].clone(memory_format=torch.contiguous_format)


@operator
def take_features(x: Tensor, group: str) -> Tensor:
    """Keep this rank's features of a tensor that every rank holds, [..., D] -> [..., D / p]."""
    return x.chunk(_size(group), dim=-1)[_groups[group].rank()].clone(memory_format=torch.contiguous_format)


@operator
def all_to_all(parts: Tensor, group: str) -> Tensor:
    """Send part r of dimension 0 to rank r."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_groups[group])
    return received


def _summed(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


def _gather_features(grad: Tensor, group: str) -> Tensor:
    return torch.cat(gather_positions(grad.unsqueeze(0), group).unbind(0), dim=-1)


def like(x: Tensor, group: str) -> Tensor:
    """Return what an operator allocates for a result of the shape of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fewer_positions(x: Tensor, group: str) -> Tensor:
    return x.new_empty((x.shape[0] // _size(group), *x.shape[1:]))


all_reduce.register_fake(like)
sum_both_ways.register_fake(like)
all_to_all.register_fake(like)
gather_positions.register_fake(lambda x, group: x.new_empty((x.shape[0] * _size(group), *x.shape[1:])))
scatter_sum.register_fake(_fewer_positions)
take_positions.register_fake(_fewer_positions)
take_features.register_fake(lambda x, group: x.new_empty((*x.shape[:-1], x.shape[-1] // _size(group))))

_differentiable(all_reduce, lambda grad, group: grad)
_differentiable(sum_both_ways, sum_both_ways)
_differentiable(gather_positions, scatter_sum)
_differentiable(scatter_sum, gather_positions)
_differentiable(take_positions, gather_positions)
_differentiable(take_features, _gather_features)
_differentiable(all_to_all, all_to_all)
