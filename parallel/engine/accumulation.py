"""Accumulate a micro-batch's gradients into float32 sums all at once, and average the sums in place.

DeepSpeed's bf16 optimizer widens and adds gradients one parameter after the other, with two kernels each over twice the
bytes: 224 launches per micro-batch for a model of 12 layers. Here the first micro-batch of a step is one multi-tensor
copy, and further ones a kernel per parameter, because PyTorch adds lists of one type only at once. The price: all bf16
gradients of a micro-batch live until its backward pass ends. Its activations are gone by then.

To average over replicas, DeepSpeed joins the sums in a copy, rounds it to bf16, sums it on every replica and copies it
back twice, even for one replica. Rounding defeats the float32 accumulation. ZeRO-1 steps one part of the weights on
each replica, so a replica needs only the average of that part. A float32 reduce-scatter sends as many bytes as a bf16
all-reduce.
"""

from typing import Any

import torch
import torch.distributed as dist

from parallel.deepspeed_internals import gradient_groups, hand_over_gradient, replace_accumulation, replace_averaging


def accumulate_together(optimizer: Any) -> None:
    """Replace how a `BF16_Optimizer` without `immediate_grad_update` accumulates gradients after a backward pass.

    The bf16 gradients are released at once, so no other code may read them later, and none need clearing before the
    next backward pass. DeepSpeed's own clearing has to go: in a pipeline's last stage a hook of the stage's output does
    it, after the loss has given the head its gradients. Sums are not set to zero after a step either, since the next
    step's first micro-batch overwrites them.
    """

    @torch.no_grad()
    def accumulate(clear_lp_grads: bool = False) -> None:
        first: list[tuple[torch.Tensor, torch.Tensor]] = []  # of a step
        further: list[tuple[torch.Tensor, torch.Tensor]] = []
        without: list[torch.Tensor] = []
        for group in gradient_groups(optimizer):
            known = group.has_gradient
            for index, (parameter, total) in enumerate(zip(group.parameters, group.totals, strict=True)):
                if parameter.grad is not None:
                    (further if known[index] else first).append((total, parameter.grad.view(total.shape)))
                    hand_over_gradient(parameter, total)
                    known[index] = True
                elif not known[index]:
                    without.append(total)
        for together, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                together(*map(list, zip(*pairs, strict=True)))
        if without:
            torch._foreach_zero_(without)

    def begin_step() -> None:
        for group in gradient_groups(optimizer):
            group.has_gradient[:] = [False] * len(group.has_gradient)

    replace_accumulation(optimizer, accumulate, begin_step, lambda: None)


def scatter_averages(engine: Any) -> None:
    """Replace how an engine with a `BF16_Optimizer` averages a step's gradients over replicas.

    Each replica gets, in place, the average of the part whose weights it steps; the rest of its sums is then useless.
    Sums are sent in DeepSpeed's `communication_data_type`. Norms are taken of the parts, so that one sum over all ranks
    is the sum of squares (see `parallel.engine.clipping.global_norm`).
    """
    groups = gradient_groups(engine.optimizer)
    owned = {id(total): _overlap(total, group.own) for group in groups for total in group.totals}

    @torch.no_grad()
    def average() -> None:
        for group in groups:
            flat, own, replicas = group.flat, group.own, group.replicas
            if replicas.size() > 1:
                sent = flat.div_(replicas.size()).to(engine.communication_data_type)  # itself, if that is its type
                received = sent.narrow(0, own.storage_offset(), own.numel())
                dist.reduce_scatter_tensor(received, sent, group=replicas)
                if sent is not flat:
                    own.copy_(received)
            # another replica may have had a gradient that this one had not
            group.has_gradient[:] = [True] * len(group.has_gradient)

    def parts_of(totals: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part for total in totals if (part := owned[id(total)]).numel()]

    replace_averaging(engine, average, parts_of)


def _overlap(total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return what of a parameter's gradient lies in a part of the flat buffer that both are views of."""
    start = total.storage_offset()
    begin, end = part.storage_offset() - start, part.storage_offset() + part.numel() - start
    return total[max(begin, 0) : max(end, 0)]
