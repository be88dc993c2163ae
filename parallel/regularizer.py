"""The entropy regularizer over sharded heads, layers, positions and sequences.

With theta and the entropy H of L layers, N heads, S sequences and T positions of one micro-batch group (the
micro-batches that all data-parallel ranks process at the same time), the whole penalty is

    per_query   P = 1/(L N S T) sum_lnst f(H_lnst - theta_ln ln T)          f(x) = x^2 where |x| > margin ln T, else 0
    per_head    P = 1/(L N) sum_ln f(E_ln - theta_ln ln T),                 E_ln = 1/(S T) sum_st H_lnst

What a rank holds, and what that asks for:

    tensor parallel     heads with their theta     nothing: its terms of the sum; the constant keeps the global N
    pipeline parallel   layers with their theta    nothing: its terms of the sum; the constant keeps the global L
    sequence parallel   all positions              nothing: positions are split only outside attention
    data parallel       sequences                  per_query: nothing, averaging over ranks is the mean over S
                                                   per_head: E is averaged over ranks before f

The engine averages gradients over the dp data-parallel ranks. For per_query rank r contributes P_r with P = mean_r P_r:
exact. For per_head every rank computes the same P from E = mean_r E_r, and wants dP/dw = P'(E) mean_r dE_r/dw: the
averaging reduction therefore passes gradients through unchanged, each rank giving P'(E) dE_r/dw, and the engine's
average does the rest.

One reduction a stage and micro-batch serves all its layers: their E sit in one vector. The penalty never waits for the
last stage: it is attached to the stage's output, where the backward pass picks it up with a constant gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from model.regularizer import RegularizerConfig, penalty
from parallel.megatron import Groups


class ShardedRegularizer:
    """Computes the part of the penalty that this rank's heads and layers contribute.

    Args:
        config: strength, margin, granularity.
        num_layers, num_heads, seq_length: of the whole model.
        num_micro_batches: in one optimizer step; gradients of micro-batches are summed, so each enters with its share.
    """

    def __init__(
        self,
        config: RegularizerConfig,
        groups: Groups,
        *,
        num_layers: int,
        num_heads: int,
        seq_length: int,
        num_micro_batches: int,
    ) -> None:
        self.config = config
        self.groups = groups
        self.terms = num_layers * num_heads
        self.max_entropy_nats = math.log(seq_length)
        self.gradient_scale = 1.0 / num_micro_batches

    def penalty(self, entropy_LBNT: Tensor, threshold_LN: Tensor) -> Tensor:
        """This rank's terms of coefficient * P, a float32 scalar; summed over (tp, pp) and averaged over dp it is the
        whole.

        Args:
            entropy_LBNT: nats, of the layers, sequences and heads held here.
            threshold_LN: theta of those layers and heads.
        """
        theta_LN = threshold_LN.to(entropy_LBNT.dtype)
        if self.config.granularity == "per_head":
            mean_LN = _AverageOverRanks.apply(entropy_LBNT.mean(dim=(1, 3)), self.groups)
            terms = penalty(mean_LN, theta_LN, self.max_entropy_nats, self.config.margin).sum()
        else:
            each = penalty(entropy_LBNT, theta_LN[:, None, :, None], self.max_entropy_nats, self.config.margin)
            terms = each.mean(dim=(1, 3)).sum()
        return self.config.coefficient * terms / self.terms

    def attach(self, output: Tensor, penalty: Tensor) -> Tensor:
        """The output unchanged; its backward pass also sends gradient into the penalty."""
        return _Attach.apply(output, penalty, self.gradient_scale)


class _AverageOverRanks(torch.autograd.Function):
    """Mean over data-parallel ranks; the gradient passes unchanged (see the module's algebra)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, groups: Groups) -> Tensor:
        if groups.grid.dp == 1:
            return local.clone()
        mean = local / groups.grid.dp
        torch.distributed.all_reduce(mean, group=groups.data)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


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
