"""ZeRO-1 in bf16: float32 sums of gradients, their averages over replicas, the step, and the new weights.

DeepSpeed's `BF16_Optimizer` lays out the weights: a flat bf16 buffer of each parameter group, of whose float32 masters
every replica steps one part. What happens in a step is written here:

    update_hp_grads           after each backward pass: bf16 gradients are added to float32 sums, all at once
    get_grads_for_reduction   after the last one: each replica gets the mean of its part, by a float32 reduce-scatter
    step                      the norm, one AdamW step, rounding to bf16, and an all-gather of the weights

Nothing in it waits for the device. DeepSpeed's own methods add gradients one parameter after the other, 224 launches
per micro-batch for a model of 12 layers. They round sums to bf16 and sum them whole on every replica, and they read the
norm of the gradients on the host.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed_internals import (
    FlatGroup,
    adam,
    bf16_optimizer,
    counts_in_norm,
    hand_over_gradient,
    record_norm,
    take_flat_groups,
)
from parallel.engine.clipping import global_norm
from parallel.sharding.megatron import Groups


class Bucket:
    """A parameter group with its gradients.

    Args:
        group: as DeepSpeed laid it out.
        data_type: in which gradients are sent.
        tensor_rank: of this process among tensor-parallel ranks.

    Attributes:
        own: float32 [part], this rank's part of the sums, and after `exchange` the mean over replicas.
        counted: what of `own` counts in the gradient norm, a view for each parameter.
    """

    def __init__(self, group: FlatGroup, data_type: torch.dtype, tensor_rank: int) -> None:
        self.parameters, self.weights, self.master = group.parameters, group.weights, group.master
        self.replicas, self.data_type = group.replicas, data_type
        self.part = group.replicas.rank() * group.master.numel()
        self.sums = torch.zeros_like(self.weights, dtype=torch.float32)
        self.sum_of = _views(self.sums, self.parameters)
        self.own = self._own_part(self.sums)
        self.counted = _overlaps(self.own, self.part, self.parameters, tensor_rank)
        self.has_sum = [False] * len(self.parameters)

    def accumulate(self) -> None:
        """Add the gradients that parameters hold to their sums, and release them.

        The first gradient of a step overwrites what the last step left. A sum without any is set to zero.
        """
        first: list[tuple[Tensor, Tensor]] = []
        further: list[tuple[Tensor, Tensor]] = []
        without: list[Tensor] = []
        for index, (parameter, total) in enumerate(zip(self.parameters, self.sum_of, strict=True)):
            if parameter.grad is not None:
                (further if self.has_sum[index] else first).append((total, parameter.grad.view(total.shape)))
                hand_over_gradient(parameter, total)
                self.has_sum[index] = True
            elif not self.has_sum[index]:
                without.append(total)
        for together, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                together(*map(list, zip(*pairs, strict=True)))
        if without:
            torch._foreach_zero_(without)

    def exchange(self) -> None:
        """Replace `own` by the mean over replicas; the rest of the sums is then useless."""
        if self.replicas.size() > 1:
            sent = self.sums.to(self.data_type)  # itself, if that is its type
            received = self._own_part(sent)
            dist.reduce_scatter_tensor(received, sent, group=self.replicas)
            if sent is not self.sums:
                self.own.copy_(received)
            self.own.div_(self.replicas.size())

    def begin_step(self) -> None:
        """Forget which parameters had a gradient."""
        self.has_sum = [False] * len(self.parameters)

    def publish(self) -> None:
        """Round the masters to bf16, and gather all replicas' parts into the weights."""
        own = self._own_part(self.weights)
        own.copy_(self.master)
        if self.replicas.size() > 1:
            dist.all_gather_into_tensor(self.weights, own, group=self.replicas)

    def _own_part(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.part, self.master.numel())


class ShardedAdam(bf16_optimizer()):  # type: ignore[misc]
    """The optimizer that DeepSpeed's engines get in the place of a `BF16_Optimizer`; `connect` completes it."""

    def connect(self, groups: Groups, data_type: torch.dtype) -> None:
        """Take over from DeepSpeed; call once, before the first step.

        Args:
            groups: of this rank.
            data_type: in which gradients are sent.
        """
        self.buckets = [Bucket(group, data_type, groups.grid.tp_rank) for group in take_flat_groups(self)]

    def backward_prologue(self) -> None:
        """Do nothing: gradients were released.

        A pipeline's last stage calls this from a hook of its output, after the loss has given the head its gradients.
        """

    def clear_lp_grads(self, set_to_none: bool = False) -> None:
        """Do nothing: gradients were released."""

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Accumulate the gradients of a backward pass."""
        for bucket in self.buckets:
            bucket.accumulate()

    @torch.no_grad()
    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Average the step's gradients over replicas; return what DeepSpeed has left to do: nothing."""
        for bucket in self.buckets:
            bucket.exchange()
        return [], {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step; hooks of AdamW decide whether it changes anything (see parallel.engine.clipping)."""
        record_norm(self, global_norm([part for bucket in self.buckets for part in bucket.counted], over_ranks=True))
        for bucket in self.buckets:
            bucket.master.grad = bucket.own
        adam(self).step()
        for bucket in self.buckets:
            bucket.publish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step; the sums are overwritten, not cleared."""
        for bucket in self.buckets:
            bucket.begin_step()


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return a flattened view of each parameter's place in a flat buffer."""
    sizes = [parameter.numel() for parameter in parameters]
    return list(flat[: sum(sizes)].split(sizes))


def _overlaps(own: Tensor, part: int, parameters: list[nn.Parameter], tensor_rank: int) -> list[Tensor]:
    """Return the views of `own`, which begins at element `part` of the flat buffer, that count in the gradient norm."""
    views, start = [], -part
    for parameter in parameters:
        view = own[max(start, 0) : max(start + parameter.numel(), 0)]
        if view.numel() and counts_in_norm(parameter, tensor_rank):
            views.append(view)
        start += parameter.numel()
    return views
