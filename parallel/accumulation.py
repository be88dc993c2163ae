"""Adds a micro-batch's gradients to DeepSpeed's float32 sums together, when its backward pass has ended.

DeepSpeed's bf16 optimizer widens and adds them one parameter after the other: two kernels each, over twice the bytes,
so that a model of 12 layers launches 224 a micro-batch, which on a slow host take longer than their work. Here the
first micro-batch of a step is one copy, and further ones a kernel a parameter: PyTorch adds lists of one type only at
once. The price is that a micro-batch's gradients all live in bf16 when its backward pass ends, its activations gone.
"""

from typing import Any

import torch


def accumulate_together(optimizer: Any) -> None:
    """Replaces how a `BF16_Optimizer` without `immediate_grad_update` takes up gradients after each backward pass.

    The bf16 gradients are released at once: no other code may read them later, and none are left to clear before the
    next backward pass. DeepSpeed's clearing has to go: in a pipeline's last stage a hook of the stage's output does it,
    by which time the loss has given the head its gradients.
    """

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        first: list[tuple[torch.Tensor, torch.Tensor]] = []  # of a step: the sum is zero, and is overwritten
        further: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group, parameters in enumerate(optimizer.bf16_groups):
            known = optimizer.fp32_groups_has_gradients[group]
            for index, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    total = optimizer.fp32_groups_gradients[group][index]
                    (further if known[index] else first).append((total, parameter.grad.view(total.shape)))
                    parameter._hp_grad, parameter.grad, known[index] = total, None, True
        for together, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                together(*map(list, zip(*pairs, strict=True)))

    optimizer.update_hp_grads = update_hp_grads
    optimizer.backward_prologue = lambda: None
