"""What one rank finds out, all ranks know, so that none waits for another that has given up."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def on_rank_zero(function: Callable[[], Any]) -> None:
    """Runs a function on rank 0; what it raises is raised on every rank."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            function()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
