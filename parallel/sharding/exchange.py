"""Differentiable exchanges over a group, between tensors split by positions and tensors split by heads or features."""

import torch
from torch import Tensor

from parallel.sharding.collectives import all_to_all


def heads_for_positions(x: Tensor, group: str, ranks: int) -> Tensor:
    """Exchange heads for the positions of the other p - 1 ranks: [T / p, ..., N, H] -> [T, ..., N / p, H]."""
    parts = torch.stack(x.chunk(ranks, dim=-2))  # [p, T / p, ..., N / p, H]: part r goes to rank r
    return all_to_all(parts, group).flatten(0, 1)


def positions_for_heads(x: Tensor, group: str, ranks: int) -> Tensor:
    """Exchange positions for the heads of the other p - 1 ranks: [T, ..., N / p, H] -> [T / p, ..., N, H]."""
    parts = all_to_all(x.unflatten(0, (ranks, -1)), group)
    return torch.cat(parts.unbind(0), dim=-2)


def features_for_positions(x_TBD: Tensor, group: str, ranks: int) -> Tensor:
    """Exchange features for the positions of the other p - 1 ranks: [T / p, B, D] -> [T, B, D / p]."""
    return heads_for_positions(x_TBD.unflatten(-1, (ranks, -1)), group, ranks).flatten(2)
