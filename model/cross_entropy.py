"""Computes the cross-entropy of a linear head in chunks, so that the logits of all tokens never exist at once.

For a chunk of tokens h [C, D], the head's weight W [V, D] and labels y [C]:

    logits = h W^T            lse = ln sum_v e^logits_v          loss = sum_c (lse_c - logits_c,y)
    dlogits = softmax(logits) - onehot(y)        dh = dlogits W        dW += dlogits^T h

The forward pass computes both gradients while the chunk's logits exist. This saves a fourth matrix product, which
recomputing the logits would cost. The backward pass only multiplies by the upstream scalar.

The vocabulary may be split over ranks: `VocabularyShard` says where a shard starts and how to reduce over shards.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.entropy_attention import HAS_TRITON

CHUNK_BYTES = 512 * 2**20
"""Size of one chunk's logits: large enough to fill a GPU, small beside a model's activations."""


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
    """Return the cross-entropy of softmax(hidden weight^T) against labels in nats, summed over tokens.

    Args:
        hidden_TBD: any leading shape, width D last; the same on every shard.
        weight_VD: this shard's rows of the head.
        labels_TB: int64, the leading shape of hidden; negative labels are ignored and contribute 0.
        vocab_size: rows of the whole head that are tokens; rows beyond are padding and get probability 0.
        shard: which rows these are. The gradient of `hidden` is this shard's part; the caller sums it over shards.

    Returns:
        A scalar in float32 or wider.
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
        valid = min(max(vocab_size - shard.start, 0), weight.shape[0])
        for rows in token_chunks(hidden.shape[0], weight):
            logits = F.linear(hidden[rows], weight)
            chunk_loss, grad_logits = _loss_and_gradient(logits, labels[rows], valid, shard, wants_grad)
            loss += chunk_loss
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[rows] = grad_logits @ weight
                add_product(grad_weight, grad_logits.t(), hidden[rows])
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return scaled(grad_hidden, grads[0]), scaled(grad_weight, grads[0]), None, None, None


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return gradient * scale [], rounded once: beside bf16 a tensor without dimensions would be rounded first."""
    return torch.mul(gradient, scale.view(1), out=torch.empty_like(gradient))


def token_chunks(tokens: int, weight: Tensor) -> list[slice]:
    """Return slices of tokens, equal but for the last, whose logits fit CHUNK_BYTES each."""
    most = max(1, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
    count = -(-tokens // most)
    size = -(-tokens // count)
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, valid: int, shard: VocabularyShard, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss summed over a chunk's rows, and, if wanted, softmax - onehot [C, V], which takes the logits' place."""
    if HAS_TRITON and logits.is_cuda and logits.dtype != torch.float64 and shard is WHOLE_VOCABULARY:
        from model.cross_entropy_triton import losses_in_place

        return losses_in_place(logits, labels, valid, with_gradient=wants_grad).sum(), logits
    row_statistics, gradient = _on_gpu() if logits.is_cuda else (_row_statistics, _gradient)
    counted, local = labels >= 0, labels - shard.start
    own_peak, own_total, target = row_statistics(logits, local, valid)
    peak = shard.maximum(own_peak)
    total, target = shard.sum(own_total * (own_peak - peak).exp()), shard.sum(target)
    lse = total.log() + peak
    loss = torch.where(counted, lse - target, 0.0).sum()
    return loss, gradient(logits, local, lse, counted, valid) if wants_grad else logits


def _row_statistics(logits: Tensor, local: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three numbers for each row of logits [C, V].

    They are the largest logit over valid columns, the sum of e^(logit - largest) over these, and the label's logit (0
    if not here). Without valid columns, the largest is -inf and the sum 0.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    here, column = _label_column(local, logits.shape[1])
    target = torch.where(here, logits.gather(1, column).squeeze(1).to(exact), 0.0)
    if not valid:
        return torch.full_like(target, -torch.inf), torch.zeros_like(target), target
    counted = logits[:, :valid].to(exact)
    peak = counted.amax(dim=1, keepdim=True)
    return peak.squeeze(1), (counted - peak).exp().sum(dim=1), target


def _gradient(logits: Tensor, local: Tensor, lse: Tensor, counted: Tensor, valid: int) -> Tensor:
    """Return softmax - onehot for rows with a label, in the logits' type: [C, V]. Overwrites the logits.

    The label's entry, softmax - 1, is computed in full precision before rounding, which keeps small values.
    """
    here, column = _label_column(local, logits.shape[1])
    probability = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp_()
    probability[:, valid:] = 0.0
    probability.mul_(counted.unsqueeze(1))
    at_label = probability.gather(1, column) - (here & counted).unsqueeze(1).to(lse.dtype)
    return probability.to(logits.dtype).scatter_(1, column, at_label.to(logits.dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, summed in the type of `total`."""
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _label_column(local: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each row's label lies among this shard's columns [C], and in which (0 where it does not) [C, 1]."""
    here = (local >= 0) & (local < columns)
    return here, torch.where(here, local, 0).unsqueeze(1)


@functools.cache
def _on_gpu() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both passes compiled to one kernel each: the logits are read twice and written once, never in float32."""
    return torch.compile(_row_statistics), torch.compile(_gradient)
