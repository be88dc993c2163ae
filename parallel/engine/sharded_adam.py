"""ZeRO-1 and 2 in bf16: float32 sums of gradients, their means over replicas, the step, and the new weights.

DeepSpeed's `BF16_Optimizer` lays out the weights: a flat bf16 buffer of each parameter group, of whose float32 masters
every replica steps one part. What happens in a step is written here:

    a hook of each gradient   when the last gradient of a bucket arrives, all are added to its float32 sums; the step's
                              last ones are then sent, behind the rest of the backward pass
    update_hp_grads           after each backward pass: the remaining gradients are added
    get_grads_for_reduction   after the last one: the remaining buckets are sent, and all are waited for
    step                      the norm, one AdamW step, rounding to bf16, and an all-gather of the weights; the next
                              forward pass waits for it bucket by bucket

Nothing in it waits for the device. DeepSpeed's own methods add gradients one parameter after the other, 224 launches
per micro-batch for a model of 12 layers. They round sums to bf16 and sum them whole on every replica. They begin when
the last backward pass has ended, and they read the norm of the gradients on the host.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Work

from parallel.deepspeed_internals import (
    FlatGroup,
    adam,
    bf16_optimizer,
    counts_in_norm,
    record_norm,
    sum_over_stages,
    take_flat_groups,
)
from parallel.engine.clipping import global_norm
from parallel.sharding.megatron import Groups

IN_FLIGHT = 2
"""Buckets that ZeRO-2 sends at once; each has a float32 buffer as long as it is sent."""


@dataclass(frozen=True)
class Exchange:
    """How a `ShardedAdam` exchanges gradients and weights.

    Attributes:
        groups: of this rank.
        num_micro_batches: of a step.
        data_type: in which gradients are sent.
        overlaps: whether to send gradients behind the backward pass and weights behind the next forward pass. It
            changes no number.
        keeps_own_sums: whether each replica keeps only its own part of the sums over micro-batches (ZeRO-2). Then every
            micro-batch's gradients are sent.
        summed_late: a parameter whose sum DeepSpeed adds up over pipeline stages after the last backward pass.
    """

    groups: Groups
    num_micro_batches: int
    data_type: torch.dtype
    overlaps: bool
    keeps_own_sums: bool
    summed_late: nn.Parameter | None


class Bucket:
    """A parameter group with its gradients and its weights, and what of both is under way between replicas.

    Attributes:
        own: float32 [part], this rank's part of the gradients; the mean over replicas once `receive` has run.
        counted: what of `own` counts in the gradient norm, a view for each parameter.
        is_sent: whether the last gradients that this bucket waits for are sent.
    """

    def __init__(self, group: FlatGroup, exchange: Exchange) -> None:
        self.parameters, self.weights, self.master = group.parameters, group.weights, group.master
        self.replicas, self.exchange = group.replicas, exchange
        self.keeps_whole = not exchange.keeps_own_sums or self.replicas.size() == 1
        self.is_late = False
        self.part = self.replicas.rank() * self.master.numel()
        self._sums: Tensor | None = None
        self._sum_of: list[Tensor] = []
        self.own = self._own_part(self._allocate_sums()) if self.keeps_whole else torch.zeros_like(self.master)
        for parameter, total in zip(self.parameters, self._sum_of, strict=self.keeps_whole):
            if parameter is exchange.summed_late:
                sum_over_stages(parameter, total)
                self.is_late = True
        tensor_rank = exchange.groups.grid.tp_rank
        self.counted = self._own_views(lambda parameter: counts_in_norm(parameter, tensor_rank))
        self._partial = _joined(self._own_views(lambda parameter: parameter.has_partial_gradient))
        self._views = [parameter.data for parameter in self.parameters]
        self._nan = self.weights.new_full((), torch.nan)
        self._sending: tuple[Work, Tensor] | None = None
        self._gathering: Work | None = None
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the gradients of the last step; sums are overwritten, not cleared."""
        self._has_sum = [False] * len(self.parameters)
        self._has_own = self.is_sent = False
        self._arrived = self._passes = 0

    @property
    def is_complete(self) -> bool:
        """Whether the sums are all that this bucket is to send at once."""
        return self._passes == (self.exchange.num_micro_batches if self.keeps_whole else 1) and not self.is_late

    def count_gradient(self) -> bool:
        """Count a gradient that a backward pass has just left; accumulate all if it is the last of this bucket."""
        assert not self.is_sent, "a gradient arrived after those of its bucket were sent"
        self._arrived += 1
        if self._arrived < len(self.parameters):
            return False
        self.accumulate()
        self._passes += 1
        return True

    def accumulate(self) -> None:
        """Add the gradients that parameters hold to their sums, and release them.

        The first gradient of a step overwrites what the last step left. A sum without any is set to zero.
        """
        if self._sums is None:
            self._allocate_sums()
        self._arrived = 0
        first: list[tuple[Tensor, Tensor]] = []
        further: list[tuple[Tensor, Tensor]] = []
        without: list[Tensor] = []
        for index, (parameter, total) in enumerate(zip(self.parameters, self._sum_of, strict=True)):
            if parameter.grad is not None:
                (further if self._has_sum[index] else first).append((total, parameter.grad.view(total.shape)))
                parameter.grad = None
                self._has_sum[index] = True
            elif not self._has_sum[index]:
                without.append(total)
        for together, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                together(*map(list, zip(*pairs, strict=True)))
        if without:
            torch._foreach_zero_(without)

    def send(self) -> None:
        """Begin to add up the sums of all replicas; each gets its part."""
        assert self._sums is not None
        self.is_sent = True
        if self.replicas.size() == 1:
            return
        sent = self._sums.to(self.exchange.data_type)  # itself, if that is its type
        received = self.own if self.keeps_whole and sent is self._sums else self._own_part(sent)
        work = dist.reduce_scatter_tensor(received, sent, group=self.replicas, async_op=True)
        self._sending = work, received
        if not self.keeps_whole:
            self._sums, self._sum_of = None, []
            self._has_sum = [False] * len(self.parameters)

    def receive(self) -> None:
        """Make `own` the mean over replicas, or add it to that of the micro-batches before."""
        if self._sending is None:
            return
        work, received = self._sending
        work.wait()
        self._sending = None
        mean = received.float().div_(self.replicas.size())
        if mean is not self.own:
            (self.own.add_ if self._has_own else self.own.copy_)(mean)
        self._has_own = True

    def begin_micro_batch(self) -> None:
        """Expect more gradients, after those of a micro-batch were sent."""
        self.is_sent, self._passes = False, 0

    def sum_partial(self) -> Work | None:
        """Begin to add up the gradients of which each tensor-parallel rank has a part, once `own` is complete."""
        if self._partial is None:
            return None
        return dist.all_reduce(self._partial, group=self.exchange.groups.tensor, async_op=True)

    def publish(self) -> None:
        """Round the masters to bf16, and begin to gather all replicas' parts into the weights.

        Until `wait_for_weights` the parameters read as NaN, so that a use before that does not pass unnoticed.
        """
        own = self._own_part(self.weights)
        own.copy_(self.master)
        if self.replicas.size() == 1:
            return
        self._gathering = dist.all_gather_into_tensor(self.weights, own, group=self.replicas, async_op=True)
        for parameter in self.parameters:
            parameter.data = self._nan.expand(parameter.shape)

    def wait_for_weights(self) -> None:
        """Make the gathered weights readable; does nothing if they are."""
        if self._gathering is None:
            return
        self._gathering.wait()
        self._gathering = None
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view

    def _allocate_sums(self) -> Tensor:
        sizes = [parameter.numel() for parameter in self.parameters]
        self._sums = torch.empty_like(self.weights, dtype=torch.float32)
        self._sums[sum(sizes) :].zero_()
        self._sum_of = list(self._sums[: sum(sizes)].split(sizes))
        return self._sums

    def _own_part(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.part, self.master.numel())

    def _own_views(self, wanted: Callable[[Any], bool]) -> list[Tensor]:
        """Return what of `own` belongs to each wanted parameter, without empty views."""
        views, start = [], -self.part
        for parameter in self.parameters:
            view = self.own[max(start, 0) : max(start + parameter.numel(), 0)]
            if view.numel() and wanted(parameter):
                views.append(view)
            start += parameter.numel()
        return views


class ShardedAdam(bf16_optimizer()):  # type: ignore[misc]
    """The optimizer that DeepSpeed's engines get in the place of a `BF16_Optimizer`; `connect` completes it.

    Buckets are sent in one order on every rank, the reverse of their use, and those that are summed late come last. A
    rank on which a gradient is missing sends later, and never in another order.
    """

    def connect(self, exchange: Exchange, modules: Iterable[nn.Module]) -> None:
        """Take over from DeepSpeed; call once, before the first step.

        Args:
            exchange: how.
            modules: which together hold all parameters, and read none before their forward pass.
        """
        self.exchange = exchange
        self.buckets = [Bucket(group, exchange) for group in take_flat_groups(self)]
        self._unsent: deque[Bucket] = deque()
        self._in_flight: deque[Bucket] = deque()
        self._expect_gradients()
        if not exchange.overlaps:
            return
        bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        for parameter, bucket in bucket_of.items():
            if bucket.replicas.size() > 1:
                parameter.register_post_accumulate_grad_hook(self._arrival(bucket))
        for module in modules:
            used = list(dict.fromkeys(bucket_of[parameter] for parameter in module.parameters()))
            module.register_forward_pre_hook(_wait_for(used), prepend=True)

    def wait_for_weights(self) -> None:
        """Make all weights readable; call before anything but the connected modules reads or writes them."""
        for bucket in self.buckets:
            bucket.wait_for_weights()

    def backward_prologue(self) -> None:
        """Do nothing: gradients were released.

        A pipeline's last stage calls this from a hook of its output, after the loss has given the head its gradients.
        """

    def clear_lp_grads(self, set_to_none: bool = False) -> None:
        """Do nothing: gradients were released."""

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Accumulate the gradients of a backward pass that are left."""
        for bucket in list(self._unsent):
            bucket.accumulate()
            if self.exchange.keeps_own_sums:
                self._send_next()
        if self.exchange.keeps_own_sums:
            self._exchange_rest()
            for bucket in self.buckets:
                bucket.begin_micro_batch()
            self._expect_gradients()

    @torch.no_grad()
    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Leave the mean over replicas in each bucket's own part; return what DeepSpeed has left to reduce: nothing."""
        if not self.exchange.keeps_own_sums:
            self._exchange_rest()
        for work in [bucket.sum_partial() for bucket in self.buckets]:
            if work is not None:
                work.wait()
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
        if not self.exchange.overlaps:
            self.wait_for_weights()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step."""
        for bucket in self.buckets:
            bucket.begin_step()
        self._expect_gradients()

    def _expect_gradients(self) -> None:
        self._unsent = deque(sorted(reversed(self.buckets), key=lambda bucket: bucket.is_late))

    def _arrival(self, bucket: Bucket) -> Callable[[Tensor], None]:
        """Return a hook that counts a gradient, and sends what is complete and next in order."""

        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            if bucket.count_gradient():
                while self._unsent and self._unsent[0].is_complete:
                    self._send_next()

        return hook

    def _send_next(self) -> None:
        bucket = self._unsent.popleft()
        bucket.send()
        self._in_flight.append(bucket)
        if self.exchange.keeps_own_sums and len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().receive()

    def _exchange_rest(self) -> None:
        """Send all buckets that are not sent yet, and wait for all."""
        while self._unsent:
            self._send_next()
        while self._in_flight:
            self._in_flight.popleft().receive()


def _wait_for(buckets: list[Bucket]) -> Callable[..., None]:
    def before_forward(*_: Any) -> None:
        for bucket in buckets:
            bucket.wait_for_weights()

    return before_forward


def _joined(views: list[Tensor]) -> Tensor | None:
    """Return one view of the memory of consecutive views; None if there are none."""
    if not views:
        return None
    size, first = sum(view.numel() for view in views), views[0].storage_offset()
    assert views[-1].storage_offset() + views[-1].numel() == first + size, "`parameter_groups` puts these side by side"
    return views[0].as_strided((size,), (1,))
