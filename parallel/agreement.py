"""Share one rank's result or error with all ranks, so that none waits for a rank that has failed."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


def on_rank_zero(function: Callable[[], Any], group: ProcessGroup | None = None) -> Any:
    """Run a function on rank 0, and return its result or raise its error on every rank; all ranks call.

    A process that has joined no group is alone, and just runs it.

    Args:
        group: of all ranks, over which the outcome is sent; None takes the default group.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
