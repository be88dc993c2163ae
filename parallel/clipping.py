"""Gradient norm, clipping and the skipping of non-finite steps without waiting for the device.

DeepSpeed's bf16 optimizer asks the device three times a step: to place a constant, whether the norm of the gradients is
finite, and whether it exceeds the limit. Each time the device runs dry, and starts the next step with an empty queue.
PyTorch's fused AdamW takes both answers as tensors instead: `grad_scale` divides the gradients while they are read, and
`found_inf` leaves the step out. That also saves the pass over all gradients that clipping is otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6  # DeepSpeed's, so that all of its optimizers clip alike


def clip_on_device(optimizer: Any, max_norm: float) -> None:
    """Lets DeepSpeed's bf16 optimizer over a fused AdamW clip to `max_norm` (0: not at all) and skip, on the device.

    Its own `gradient_clipping` must be 0.
    """
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.get_global_norm_of_tensors = global_norm
    bf16_optimizer.is_invalid_grad_norm = lambda norm: False

    def before_step(adam: torch.optim.Optimizer, *_: Any) -> None:
        norm = optimizer._global_grad_norm
        adam.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        if max_norm > 0:
            adam.grad_scale = ((norm + EPSILON) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]

    optimizer.optimizer.register_step_pre_hook(before_step)


def global_norm(input_tensors: Sequence[Tensor], mpu: Any = None, norm_type: float = 2) -> Tensor:
    """The L2 norm of all tensors, those of other tensor- and pipeline-parallel ranks among them: a float32 scalar."""
    assert norm_type == 2
    square = torch.stack(torch._foreach_norm(list(input_tensors))).square().sum()
    if mpu is not None:
        torch.distributed.all_reduce(square, group=mpu.get_model_parallel_group())
    return square.sqrt()
