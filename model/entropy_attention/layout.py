"""Allocation that follows the memory order of another tensor, so that permuting a result back costs nothing."""

import torch
from torch import Tensor


def empty_in_layout(like: Tensor) -> Tensor:
    """An uninitialized tensor of `like`'s shape and type, dense, its dimensions in memory in order of stride.

    Unlike `torch.empty_like` this keeps the order for views with gaps, such as a third of a joint query-key-value
    projection. The last dimension stays innermost.
    """
    order = sorted(range(like.dim() - 1), key=lambda dim: -like.stride(dim)) + [like.dim() - 1]
    dense = torch.empty([like.shape[dim] for dim in order], dtype=like.dtype, device=like.device)
    return dense.permute([order.index(dim) for dim in range(like.dim())])
