"""Exchanges over a group, with gradients, between what is split by positions and what by heads or features."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def heads_for_positions(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T / cp, ..., N, H] -> [T, ..., N / cp, H]: gives away heads for the positions of the others."""
    cp = group.size()
    parts = torch.stack(x.chunk(cp, dim=-2))  # [cp, T / cp, ..., N / cp, H]: part r goes to rank r
    return _AllToAll.apply(parts, group).flatten(0, 1)


def positions_for_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ..., N / cp, H] -> [T / cp, ..., N, H]: gives away positions for the heads of the others."""
    cp = group.size()
    parts = _AllToAll.apply(x.unflatten(0, (cp, -1)).contiguous(), group)
    return torch.cat(parts.unbind(0), dim=-2)


def features_for_positions(x_TBD: Tensor, group: ProcessGroup) -> Tensor:
    """[T / p, B, D] -> [T, B, D / p]: gives away features for the positions of the others."""
    return heads_for_positions(x_TBD.unflatten(-1, (group.size(), -1)), group).flatten(2)


class _AllToAll(torch.autograd.Function):
    """Part r of dimension 0 goes to rank r; the gradient goes the way back, which is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(received, grads[0].contiguous(), group=ctx.group)
        return received, None
