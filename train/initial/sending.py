"""Send a model's whole weights from rank 0 to all ranks, a tensor at a time."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from train.initial.source import Weights

Shapes = list[tuple[str, torch.Size]]


def shapes_of(weights: Weights) -> Shapes:
    """Return the names and shapes that the other ranks need to know first."""
    return [(name, tensor.shape) for name, tensor in weights.items()]


def sent_from_rank_zero(weights: Weights, shapes: Shapes, group: ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor on every rank; all ranks call and take all.

    Args:
        weights: on rank 0, which then keeps them no longer; empty elsewhere.
        shapes: from rank 0.
        group: of all ranks, with gloo.
    """
    for name, shape in shapes:
        whole = weights.pop(name).contiguous() if dist.get_rank() == 0 else torch.empty(shape)
        dist.broadcast(whole, src=0, group=group)
        yield name, whole
