"""The entropy regularizer over sharded heads, layers, positions and sequences.

With theta and the entropy H of L layers, N heads, S sequences and T positions of one micro-batch group (the
micro-batches that all data-parallel ranks process at the same time), the whole penalty is

    per_query   P = 1/(L N S T) sum_lnst f(H_lnst - theta_ln R_st)          f: model.regularizer.penalty
    per_head    P = 1/(L N) sum_ln f(E_ln - theta_ln ln T),                 E_ln = 1/(S T) sum_st H_lnst

R is ln T, or with a causal target the largest entropy that each query can reach. A rank can compute it by itself, since
it holds all positions of its heads.

What a rank holds along each axis, and which communication that needs:

    tensor parallel     heads with their theta     none: the rank's terms of the sum, divided by the global N
    pipeline parallel   layers with their theta    none: the rank's terms of the sum, divided by the global L
    sequence parallel   all positions              none: positions are split only outside attention
    context parallel    heads, all positions       none: attention has exchanged positions for heads; every rank holds
                                                   theta whole and uses its own heads' part
    data parallel       sequences                  per_query: none, averaging over ranks is the mean over S
                                                   per_head: E is averaged over ranks before f

The engine averages gradients over the dp x cp replicas. That fits data-parallel ranks, since P is the mean of their
P_r. Context-parallel ranks hold different terms of a sum, so their terms are multiplied by cp.

For per_head every data-parallel rank has the same E = mean_r E_r, and the gradient is dP/dw = P'(E) mean_r dE_r/dw.
Each rank contributes P'(E) dE_r/dw, and the engine takes the mean. So the reduction that averages E passes gradients
through unchanged.

One reduction per stage and micro-batch serves all layers of the stage: their E form one vector. It starts when the
stage's layers have run, and the backward pass waits for it, so that the head's or the next stage's products hide it.
The penalty needs nothing of the last stage: it is attached to the stage's output, and the backward pass gives it a
constant gradient.

A CUDA graph replays kernels, not Python code. The coefficient may change from step to step, so its factor `strength` is
a tensor.

per_head squares after averaging over a micro-batch group, so its value depends on micro_batch_size x dp. Compare
layouts at equal products only. per_query does not depend on the layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.regularizer import RegularizerConfig, penalty, reachable_entropy
from parallel.sharding.megatron import Groups


class ShardedRegularizer:
    """The part of the penalty that this rank's heads and layers contribute.

    Args:
        config: coefficient, margin, granularity, shape, target.
        layers: of this stage.
        num_layers: of the whole model.
        num_heads: of the whole model.
        seq_length: T, of whole sequences.
        num_micro_batches: in one optimizer step. Gradients are summed over them, so each counts 1 / num_micro_batches.
        device: of this rank.

    Attributes:
        strength: float32 scalar on the device, by which the coefficient is multiplied in the current step.
        margin_L1: the margins of this stage's layers, [layers, 1] in float64 on the device.
    """

    def __init__(
        self,
        config: RegularizerConfig,
        groups: Groups,
        *,
        layers: range,
        num_layers: int,
        num_heads: int,
        seq_length: int,
        num_micro_batches: int,
        device: torch.device,
    ) -> None:
        grid = groups.grid
        self.config, self.groups = config, groups
        self.factor = config.coefficient * grid.cp / (num_layers * num_heads)
        self.seq_length = seq_length
        self.gradient_scale = 1.0 / num_micro_batches
        self.strength = torch.ones((), device=device)
        self.margin_L1 = config.margins(layers).unsqueeze(1).to(device)
        held = len(grid.heads(num_heads))
        self.own_heads = slice(grid.cp_rank * held, (grid.cp_rank + 1) * held)

    def attach(
        self,
        output: Tensor,
        entropy_LBNT: Tensor,
        threshold_LN: Tensor,
        document_start_BT: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Attach the penalty to the stage's output: its value stays, its backward pass also runs the penalty's.

        Args:
            output: of this stage, any shape.
            entropy_LBNT: entropies in nats of the stage's layers, this rank's sequences and the heads whose attention
                it computed.
            threshold_LN: theta of those layers and of all heads whose weights this rank holds.
            document_start_BT: for attention within documents, the first position that each query attends to.

        Returns:
            The output, and a function that returns this rank's terms of coefficient * P, a scalar in the entropies'
            type. Their sum over (tp, pp), averaged over (dp, cp), is the whole penalty. Call it after the backward
            pass.
        """
        theta_LN = threshold_LN[:, self.own_heads].to(entropy_LBNT.dtype)
        if self.config.granularity == "per_query":
            reachable = reachable_entropy(self.config, self.seq_length, entropy_LBNT, document_start_BT)
            theta, margin = theta_LN[:, None, :, None], self.margin_L1.to(entropy_LBNT.dtype)[:, None, :, None]
            each = penalty(entropy_LBNT, theta, margin, reachable, self.config.shape)
            terms = self.strength * (self.factor * each.mean(dim=(1, 3)).sum())
            return _Attach.apply(output, terms, self.gradient_scale), terms.detach
        local_LN = entropy_LBNT.mean(dim=(1, 3))
        average = _Average(local_LN.detach(), self.groups)
        theta = theta_LN.detach()
        return (
            _AttachPerHead.apply(output, local_LN, theta_LN, average, self),
            lambda: self.per_head(average.wait(), theta),
        )

    def per_head(self, mean_LN: Tensor, theta_LN: Tensor) -> Tensor:
        """Return this rank's terms of the penalty, a scalar, from the mean entropies of its heads."""
        reachable = reachable_entropy(self.config, self.seq_length, mean_LN)
        each = penalty(mean_LN, theta_LN, self.margin_L1.to(mean_LN.dtype), reachable, self.config.shape)
        return self.strength * (self.factor * each.sum())


class _Average:
    """The mean of a small vector over data-parallel ranks, being reduced in the background."""

    def __init__(self, local: Tensor, groups: Groups) -> None:
        self._mean = local / groups.grid.dp
        self._work = None
        if groups.grid.dp > 1:
            self._work = torch.distributed.all_reduce(self._mean, group=groups.batch, async_op=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._mean


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor, gradient_scale: float) -> Tensor:
        ctx.gradient_scale = gradient_scale
        ctx.save_for_backward(penalty)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (penalty,) = ctx.saved_tensors
        return grads[0], torch.full_like(penalty, ctx.gradient_scale), None


class _AttachPerHead(torch.autograd.Function):
    """Like `_Attach`, but the backward pass computes the penalty, when the mean entropies have arrived."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, local_LN: Tensor, theta_LN: Tensor, average: _Average, regularizer: ShardedRegularizer
    ) -> Tensor:
        ctx.average, ctx.regularizer = average, regularizer
        ctx.save_for_backward(theta_LN)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (theta_LN,) = ctx.saved_tensors
        inputs = (ctx.average.wait().detach().requires_grad_(), theta_LN.detach().requires_grad_())
        with torch.enable_grad():
            terms = ctx.regularizer.gradient_scale * ctx.regularizer.per_head(*inputs)
        grad_mean, grad_theta = torch.autograd.grad(terms, inputs)
        return grads[0], grad_mean, grad_theta, None, None
