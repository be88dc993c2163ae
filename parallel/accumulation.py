"""Takes a micro-batch's gradients up into DeepSpeed's float32 sums together, and averages those where they lie.

DeepSpeed's bf16 optimizer widens and adds gradients one parameter after the other: two kernels each, over twice the
bytes, so that a model of 12 layers launches 224 a micro-batch. Here the first micro-batch of a step is one copy, and
further ones a kernel a parameter: PyTorch adds lists of one type only at once. The price is that a micro-batch's
gradients all live in bf16 when its backward pass ends, its activations gone.

To average over replicas DeepSpeed joins the sums in a copy, rounds that to bf16 (which is what they were kept in
float32 against), and copies it back twice; over one replica too.
"""

from typing import Any

import torch
import torch.distributed as dist


def accumulate_together(optimizer: Any) -> None:
    """Replaces how a `BF16_Optimizer` without `immediate_grad_update` takes up gradients after each backward pass.

    The bf16 gradients are released at once: no other code may read them later, and none are left to clear before the
    next backward pass. DeepSpeed's clearing has to go: in a pipeline's last stage a hook of the stage's output does it,
    by which time the loss has given the head its gradients. Nor are sums set to zero after a step: the next one's first
    micro-batch overwrites them.
    """

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        first: list[tuple[torch.Tensor, torch.Tensor]] = []  # of a step
        further: list[tuple[torch.Tensor, torch.Tensor]] = []
        without: list[torch.Tensor] = []
        for group, parameters in enumerate(optimizer.bf16_groups):
            known = optimizer.fp32_groups_has_gradients[group]
            for index, parameter in enumerate(parameters):
                total = optimizer.fp32_groups_gradients[group][index]
                if parameter.grad is not None:
                    (further if known[index] else first).append((total, parameter.grad.view(total.shape)))
                    parameter._hp_grad, parameter.grad, known[index] = total, None, True
                elif not known[index]:
                    without.append(total)
        for together, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                together(*map(list, zip(*pairs, strict=True)))
        if without:
            torch._foreach_zero_(without)

    def clear_hp_grads() -> None:
        for known in optimizer.fp32_groups_has_gradients:
            known[:] = [False] * len(known)

    optimizer.update_hp_grads = update_hp_grads
    optimizer.clear_hp_grads = clear_hp_grads
    optimizer.backward_prologue = lambda: None


def average_in_place(engine: Any, replicas: dist.ProcessGroup) -> None:
    """Replaces how an engine around a `BF16_Optimizer` averages a step's gradients over replicas; they are sent as
    DeepSpeed's `communication_data_type` says.
    """

    @torch.no_grad()
    def buffered_allreduce_fallback(grads: Any = None, elements_per_buffer: int = 0) -> None:
        if replicas.size() > 1:
            for flat in engine.optimizer.fp32_groups_gradients_flat:
                sent = flat.div_(replicas.size()).to(engine.communication_data_type)  # itself, if that is its type
                dist.all_reduce(sent, group=replicas)
                flat.copy_(sent)

    engine.buffered_allreduce_fallback = buffered_allreduce_fallback
