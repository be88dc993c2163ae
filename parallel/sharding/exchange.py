"""Exchanges over a group, with gradients, between what is split by positions and what by heads or features."""

import torch
from torch import Tensor

from parallel.sharding.collectives import all_to_all


def heads_for_positions(x: Tensor, group: str, ranks: int) -> Tensor:
    """[T / p, ..., N, H] -> [T, ..., N / p, H]: gives away heads for the positions of the other p - 1 ranks."""
    parts = torch.stack(x.chunk(ranks, dim=-2))  # [p, T / p, ..., N / p, H]: part r goes to rank r
    return all_to_all(parts, group).flatten(0, 1)


def positions_for_heads(x: Tensor, group: str, ranks: int) -> Tensor:
    """[T, ..., N / p, H] -> [T / p, ..., N, H]: gives away positions for the heads of the other p - 1 ranks."""
    parts = all_to_all(x.unflatten(0, (ranks, -1)), group)
    return torch.cat(parts.unbind(0), dim=-2)


def features_for_positions(x_TBD: Tensor, group: str, ranks: int) -> Tensor:
    """[T / p, B, D] -> [T, B, D / p]: gives away features for the positions of the other p - 1 ranks."""
    return heads_for_positions(x_TBD.unflatten(-1, (ranks, -1)), group, ranks).flatten(2)
