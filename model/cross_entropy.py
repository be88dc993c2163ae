"""Cross-entropy of a linear head, chunk by chunk: the logits of all tokens are never held at once.

For a chunk of tokens h [C, D], the head's weight W [V, D] and labels y [C]:

    logits = h W^T            lse = ln sum_v e^logits_v          loss = sum_c (lse_c - logits_c,y)
    dlogits = softmax(logits) - onehot(y)        dh = dlogits W        dW += dlogits^T h

Both gradients are taken at once in the forward pass while the chunk's logits exist, which saves the fourth matrix product that
recomputing them in the backward pass would cost; the backward pass multiplies by the upstream scalar.

The vocabulary may be split over ranks: `VocabularyShard` says where a shard starts and how to reduce over shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Size of one chunk's logits in float32: large enough to fill a GPU, small beside a model's activations."""


def _unsharded(local: Tensor) -> Tensor:
    return local


@dataclass(frozen=True)
class VocabularyShard:
    """The rows [start, start + rows) of the head that a weight holds, and reductions over all shards (out of place)."""

    start: int = 0
    maximum: Callable[[Tensor], Tensor] = _unsharded
    sum: Callable[[Tensor], Tensor] = _unsharded


WHOLE_VOCABULARY = VocabularyShard()


def linear_cross_entropy(
    hidden_TBD: Tensor,
    weight_VD: Tensor,
    labels_TB: Tensor,
    *,
    vocab_size: int,
    shard: VocabularyShard = WHOLE_VOCABULARY,
) -> Tensor:
    """The cross-entropy in nats of softmax(hidden weight^T) against labels, summed over tokens: a scalar, float32 or wider.

    Args:
        hidden_TBD: any leading shape, width D last; the same on every shard.
        weight_VD: this shard's rows of the head.
        labels_TB: int64, the leading shape of hidden; negative labels are ignored and contribute 0.
        vocab_size: rows of the whole head that are tokens; rows beyond are padding and get probability 0.
        shard: which rows these are; its gradient for `hidden` is this shard's part, to be summed by the caller.
    """
    hidden, labels = hidden_TBD.flatten(0, -2), labels_TB.flatten()
    return _LinearCrossEntropy.apply(hidden, weight_VD, labels, vocab_size, shard)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, shard: VocabularyShard
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_grad else None
        loss = hidden.new_zeros((), dtype=exact)
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        valid = min(max(vocab_size - shard.start, 0), weight.shape[0])
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = F.linear(hidden[rows], weight)
            loss_chunk, grad_logits = _softmax_cross_entropy(logits, labels[rows], valid, shard, exact)
            loss += loss_chunk
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[rows] = grad_logits @ weight
                grad_weight += grad_logits.t() @ hidden[rows]
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grads[0].to(grad_hidden.dtype),
            grad_weight * grads[0].to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _softmax_cross_entropy(
    logits: Tensor, labels: Tensor, valid: int, shard: VocabularyShard, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Summed loss and the gradient of the logits [C, V] for one chunk; columns from `valid` on are padding."""
    dtype, logits = logits.dtype, logits.to(exact)
    logits[:, valid:] = -torch.inf
    peak = shard.maximum(logits.amax(dim=1))
    exponentials = (logits - peak.unsqueeze(1)).exp_()
    total = shard.sum(exponentials.sum(dim=1))
    local = labels - shard.start
    here = (local >= 0) & (local < logits.shape[1])
    column = torch.where(here, local, 0).unsqueeze(1)
    target = shard.sum(torch.where(here, logits.gather(1, column).squeeze(1), 0.0))
    counted = labels >= 0
    loss = torch.where(counted, total.log() + peak - target, 0.0).sum()
    grad = exponentials.div_(total.unsqueeze(1))
    grad.scatter_add_(1, column, -here.to(exact).unsqueeze(1))
    return loss, grad.mul_(counted.unsqueeze(1)).to(dtype)
