"""Gradient norm, clipping and the leaving out of steps without waiting for the device.

DeepSpeed's bf16 optimizer asks the device three times a step: to place a constant, whether the norm of the gradients is
finite, and whether it exceeds the limit. Each time the device runs dry, and starts the next step with an empty queue.
PyTorch's fused AdamW takes the answers as tensors instead: `grad_scale` divides the gradients while they are read, and
`found_inf` leaves weights, moments and step counts as they are. That also saves the pass over all gradients that
clipping is otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.engine.telemetry import PendingReport
from parallel.launch import local_device

EPSILON = 1e-6  # DeepSpeed's, so that all of its optimizers clip alike


def decide_on_device(adam: torch.optim.AdamW, measure: Callable[[], PendingReport], max_norm: float) -> None:
    """Lets a fused AdamW leave out the steps that `measure` does not accept, and clip to `max_norm` (0: not at all).

    `measure` is asked whenever DeepSpeed calls the optimizer: when gradients are reduced and their norm is known, once
    for each of its parameter groups.
    """

    def before_step(*_: Any) -> None:
        report = measure()
        adam.found_inf = report.accepted.logical_not().float()  # type: ignore[attr-defined]
        if max_norm > 0:
            scale = ((report.gradient_norm + EPSILON) / max_norm).clamp(min=1.0)
            adam.grad_scale = scale.float()  # type: ignore[attr-defined]

    adam.register_step_pre_hook(before_step)


def leave_norms_on_device() -> None:
    """Keeps DeepSpeed's bf16 optimizer from reading the norm of the gradients; its own clipping must be off."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.get_global_norm_of_tensors = global_norm
    bf16_optimizer.is_invalid_grad_norm = lambda norm: False


def global_norm(input_tensors: Sequence[Tensor], mpu: Any = None, norm_type: float = 2) -> Tensor:
    """The L2 norm over all ranks, of each of which these are the parts that count: a float32 scalar."""
    assert norm_type == 2
    square = torch.zeros((), device=local_device())  # a rank may have none that count
    if input_tensors:
        square = torch.stack(torch._foreach_norm(list(input_tensors))).square().sum()
    if mpu is not None:
        torch.distributed.all_reduce(square)
    return square.sqrt()
