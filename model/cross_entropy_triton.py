"""Computes loss and gradient of a chunk of logits in one kernel, for a head that is not split.

Each program reads one row twice. The second read hits the cache, so device memory sees one read and one write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


def losses_in_place(logits: Tensor, labels: Tensor, valid: int, *, with_gradient: bool) -> Tensor:
    """Return lse - logit of the label for each row, 0 if the label is negative: [C], float32.

    Args:
        logits: [C, V], contiguous, in float32 or a 16-bit type. with_gradient overwrites them with softmax - onehot,
            which is 0 in rows without a label and in padding.
        labels: [C] int64, below `valid`.
        valid: columns that are tokens; the rest is padding.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    row_kernel[(rows,)](logits, labels, losses, columns, valid, GRADIENT=with_gradient, BLOCK=block, num_warps=WARPS)
    return losses


@triton.jit
def row_kernel(logits, labels, losses, columns, valid, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the loss of one row of logits and, with GRADIENT, overwrite the row with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    counts = label >= 0
    # read before the sums, behind whose barriers other warps overwrite it
    target = tl.load(logits + label, mask=counts, other=0.0).to(tl.float32)
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < valid, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    lse = peak + tl.log(total)
    tl.store(losses + row, tl.where(counts, lse - target, 0.0))
    if GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < columns).to(tl.float32)
            softmax = tl.where(column < valid, tl.exp(x - lse), 0.0)
            gradient = tl.where(counts, tl.where(column == label, softmax - 1.0, softmax), 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
