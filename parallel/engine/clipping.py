"""Compute the gradient norm, clip, and skip refused steps without waiting for the device.

DeepSpeed's bf16 optimizer waits for the device three times a step: to place a constant, to learn whether the gradient
norm is finite, and whether it exceeds the limit. Each time the device runs dry. PyTorch's fused AdamW takes the answers
as tensors instead: `grad_scale` divides the gradients while they are read, and `found_inf` leaves weights, moments and
step counts as they are. That also saves clipping's own pass over all gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.engine.telemetry import PendingReport
from parallel.launch import local_device

EPSILON = 1e-6  # DeepSpeed's, so that all of its optimizers clip alike


def decide_on_device(adam: torch.optim.AdamW, measure: Callable[[], PendingReport], max_norm: float) -> None:
    """Let a fused AdamW skip the steps that `measure` does not accept, and clip the others.

    Args:
        measure: called whenever DeepSpeed steps the optimizer, once per parameter group; gradients are reduced by then.
        max_norm: largest gradient norm; 0 does not clip.
    """

    def before_step(*_: Any) -> None:
        report = measure()
        adam.found_inf = report.accepted.logical_not().float()  # type: ignore[attr-defined]
        if max_norm > 0:
            scale = ((report.gradient_norm + EPSILON) / max_norm).clamp(min=1.0)
            adam.grad_scale = scale.float()  # type: ignore[attr-defined]

    adam.register_step_pre_hook(before_step)


def global_norm(parts: Sequence[Tensor], over_ranks: bool = False) -> Tensor:
    """Return the L2 norm of tensors: a float32 scalar on the device.

    Args:
        parts: those that count on this rank; there may be none.
        over_ranks: whether the parts of all ranks count; then all call.
    """
    square = torch.zeros((), device=local_device())
    if parts:
        square = torch.stack(torch._foreach_norm(list(parts))).square().sum()
    if over_ranks:
        torch.distributed.all_reduce(square)
    return square.sqrt()
