"""Takes a micro-batch's gradients up into DeepSpeed's float32 sums together, and averages those where they lie.

DeepSpeed's bf16 optimizer widens and adds gradients one parameter after the other: two kernels each, over twice the
bytes, so that a model of 12 layers launches 224 a micro-batch. Here the first micro-batch of a step is one copy, and
further ones a kernel a parameter: PyTorch adds lists of one type only at once. The price is that a micro-batch's
gradients all live in bf16 when its backward pass ends, its activations gone.

To average over replicas DeepSpeed joins the sums in a copy, rounds that to bf16 (which is what they were kept in
float32 against), sums it on every replica and copies it back twice; over one replica too. ZeRO-1's optimizer steps a
part of the weights on each replica, so the average of that part is all that a replica needs: a reduce-scatter in
float32 sends what an all-reduce in bf16 does.
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


def scatter_averages(engine: Any) -> None:
    """Replaces how an engine around a `BF16_Optimizer` averages a step's gradients over replicas: each gets the average
    of the part whose weights it steps, in place, and finds in the rest nothing that it may use.

    They are sent as DeepSpeed's `communication_data_type` says. What DeepSpeed takes norms of becomes the parts, so
    that the sum of squares is one over all ranks (see `parallel.engine.clipping.global_norm`).
    """
    optimizer = engine.optimizer
    groups = optimizer.real_dp_process_group
    own_parts = optimizer.fp32_groups_gradient_flat_partition
    owned = {
        id(total): _overlap(total, own)
        for totals, own in zip(optimizer.fp32_groups_gradients, own_parts, strict=True)
        for total in totals
    }
    get_grads_for_norm = optimizer.get_grads_for_norm

    @torch.no_grad()
    def buffered_allreduce_fallback(grads: Any = None, elements_per_buffer: int = 0) -> None:
        for flat, own, replicas in zip(optimizer.fp32_groups_gradients_flat, own_parts, groups, strict=True):
            if replicas.size() > 1:
                sent = flat.div_(replicas.size()).to(engine.communication_data_type)  # itself, if that is its type
                received = sent.narrow(0, own.storage_offset(), own.numel())
                dist.reduce_scatter_tensor(received, sent, group=replicas)
                if sent is not flat:
                    own.copy_(received)
        for known in optimizer.fp32_groups_has_gradients:
            known[:] = [True] * len(known)  # another replica may have had one that this one had not

    def own_grads_for_norm(for_clipping: bool = False) -> tuple[list[torch.Tensor], Any]:
        assert not for_clipping, "DeepSpeed's own clipping is off"
        totals, of_experts = get_grads_for_norm()
        parts = (owned[id(total)] for total in totals)
        return [part for part in parts if part.numel()], of_experts

    engine.buffered_allreduce_fallback = buffered_allreduce_fallback
    optimizer.get_grads_for_norm = own_grads_for_norm


def _overlap(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What of a parameter's gradient lies in a part of the flat buffer that both are views of."""
    start = total.storage_offset()
    begin, end = part.storage_offset() - start, part.storage_offset() + part.numel() - start
    return total[max(begin, 0) : max(end, 0)]
