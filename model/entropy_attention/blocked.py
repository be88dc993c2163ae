"""Attention with entropies in PyTorch, one block of query rows at a time: memory linear in T, hand-written gradients.

For one query row with scaled scores s_j, m the largest of them, e_j = exp(s_j - m) and l = sum_j e_j:

    p_j = e_j / l        H = ln l - sum_j e_j (s_j - m) / l

Unlike ln sum_j exp(s_j) - sum_j p_j s_j, this does not cancel for large scores. With upstream gradients dO of the
output and dH of the entropy,

    g_j = dO . v_j - dH ln p_j,    dS_j = p_j (g_j - sum_i p_i g_i)

Nothing of size T x T outlives a block. Scores and logarithms are in base 2, since exp2 is faster. A short sequence is
one block, which makes this materialized attention.

Tensor names carry their shape: B sequences, N query heads, K key heads, G = N / K query heads a key head, T tokens,
H head width, R rows of a block times G, C keys that the block can see, S the two parts of a row's shift, m and log l.
"""

import math

import torch
from torch import Tensor

from model.entropy_attention.layout import empty_in_layout

MASKED = -1e30  # finite, so that exp2(MASKED) * MASKED is 0 and not NaN
LN2 = math.log(2)
BLOCK_ROWS = 128
SCORES_AT_ONCE = 2**16  # a block of scores should stay in the cache of one core


def forward(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start_BT: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, N, T, H], entropy [B, N, T] in nats (empty if not asked for), each row's shift [2, B, N, T]."""
    output_BNTH = empty_in_layout(q_BNTH)
    compute = _compute_type(q_BNTH)
    shift_SBNT = q_BNTH.new_empty((2, *q_BNTH.shape[:3]), dtype=compute)
    entropy_BNT = shift_SBNT.new_empty(q_BNTH.shape[:3] if with_entropy else 0)
    for batch in _batches(q_BNTH, k_BKTH):
        k_BKTC, v_BKTC = k_BKTH[batch].to(compute), v_BKTH[batch].to(compute)
        start_BT = None if document_start_BT is None else document_start_BT[batch]
        for rows, keys in _blocks(q_BNTH.shape[2], causal, start_BT):
            q_BKRH = _scaled_rows(q_BNTH[batch, :, rows], k_BKTH.shape[1], _factor(temperature, rows, scale))
            s_BKRC = q_BKRH @ k_BKTC[:, :, keys].transpose(-1, -2)
            _mask(s_BKRC, rows, keys, causal, start_BT)
            max_BKR1 = s_BKRC.amax(-1, keepdim=True)
            s_BKRC -= max_BKR1
            e_BKRC = s_BKRC.exp2()
            sum_BKR1 = e_BKRC.sum(-1, keepdim=True)
            shape = q_BNTH[batch, :, rows].shape
            output_BNTH[batch, :, rows] = ((e_BKRC @ v_BKTC[:, :, keys]) / sum_BKR1).view(shape)
            shift_SBNT[0, batch, :, rows] = max_BKR1.view(shape[:3])
            shift_SBNT[1, batch, :, rows] = sum_BKR1.log2().view(shape[:3])
            if with_entropy:
                mean_BKR1 = e_BKRC.mul_(s_BKRC).sum(-1, keepdim=True) / sum_BKR1
                entropy_BNT[batch, :, rows] = LN2 * (sum_BKR1.log2() - mean_BKR1).view(shape[:3])
    return output_BNTH, entropy_BNT, shift_SBNT


def backward(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start_BT: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    shift_SBNT: Tensor,
    scale: float,
    causal: bool,
    dq_BNTH: Tensor,
    dk_BKTH: Tensor,
    dv_BKTH: Tensor,
) -> Tensor | None:
    """Fills the gradients of query, key and value, and returns that of the temperature (None without one).

    Output and entropy are not needed here: a whole row of scores is at hand.
    """
    compute, key_heads = shift_SBNT.dtype, k_BKTH.shape[1]
    ds_s_BNT = torch.empty_like(shift_SBNT[0])
    for batch in _batches(q_BNTH, k_BKTH):
        k_BKTC, v_BKTC = k_BKTH[batch].to(compute), v_BKTH[batch].to(compute)
        dk_BKTC, dv_BKTC = torch.zeros_like(k_BKTC), torch.zeros_like(v_BKTC)
        start_BT = None if document_start_BT is None else document_start_BT[batch]
        for rows, keys in _blocks(q_BNTH.shape[2], causal, start_BT):
            at = (batch, slice(None), rows)
            factor = _factor(temperature, rows, scale)
            q_BKRH = _scaled_rows(q_BNTH[at], key_heads, factor)
            do_BKRH = _scaled_rows(grad_output_BNTH[at], key_heads, None, compute)
            column = do_BKRH.shape[:3] + (1,)
            s_BKRC = q_BKRH @ k_BKTC[:, :, keys].transpose(-1, -2)
            s_BKRC -= shift_SBNT[0][at].reshape(column)
            _mask(s_BKRC, rows, keys, causal, start_BT)
            s_BKRC -= shift_SBNT[1][at].reshape(column)  # apart from the maximum: their sum would be rounded first
            p_BKRC = s_BKRC.exp2()
            dv_BKTC[:, :, keys] += p_BKRC.transpose(-1, -2) @ do_BKRH
            g_BKRC = do_BKRH @ v_BKTC[:, :, keys].transpose(-1, -2)
            if grad_entropy_BNT is not None:
                g_BKRC.addcmul_(s_BKRC, grad_entropy_BNT[at].reshape(column), value=-LN2)
            ds_BKRC = torch.ops.aten._softmax_backward_data(g_BKRC, p_BKRC, -1, compute)
            dk_BKTC[:, :, keys] += ds_BKRC.transpose(-1, -2) @ q_BKRH
            dq_BNRH = (ds_BKRC @ k_BKTC[:, :, keys]).view(q_BNTH[at].shape)
            dq_BNTH[at] = dq_BNRH * (LN2 * factor)
            if temperature is not None:  # dL/dt_i = -(1/t_i) sum_j dS_ij s_ij, and s_ij = (scaled q_i) . k_j
                ds_s_BNT[at] = (q_BKRH.view(dq_BNRH.shape) * dq_BNRH).sum(-1) * LN2
        dk_BKTH[batch], dv_BKTH[batch] = dk_BKTC * LN2, dv_BKTC
    if temperature is None:
        return None
    shared = (0, 2) if temperature.dim() == 1 else 0
    return (-ds_s_BNT.sum(shared) / temperature).to(temperature.dtype)


def _compute_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _batches(q_BNTH: Tensor, k_BKTH: Tensor) -> list[slice]:
    """Ranges of sequences whose block of scores has about SCORES_AT_ONCE elements."""
    sequences, heads, tokens, _ = q_BNTH.shape
    at_once = max(1, SCORES_AT_ONCE // (heads * min(tokens, BLOCK_ROWS) * tokens))
    return [slice(start, min(start + at_once, sequences)) for start in range(0, sequences, at_once)]


def _blocks(tokens: int, causal: bool, start_BT: Tensor | None) -> list[tuple[slice, slice]]:
    """(query rows, keys that any of them can see) of every block."""
    starts = range(0, tokens, BLOCK_ROWS)
    rows = [slice(start, min(start + BLOCK_ROWS, tokens)) for start in starts]
    firsts = [0] * len(rows) if start_BT is None else start_BT[:, ::BLOCK_ROWS].amin(0).tolist()
    return [(r, slice(first, r.stop if causal else tokens)) for r, first in zip(rows, firsts, strict=True)]


def _factor(temperature: Tensor | None, rows: slice, scale: float) -> Tensor | float:
    """What a query row is multiplied by, scale / (t ln 2): a number or [N, rows or 1, 1]."""
    scale /= LN2
    if temperature is None:
        return scale
    t_NR = temperature[:, None] if temperature.dim() == 1 else temperature[:, rows]
    return (scale / t_NR).unsqueeze(-1)


def _scaled_rows(
    x_BNRH: Tensor, key_heads: int, factor: Tensor | float | None, compute: torch.dtype | None = None
) -> Tensor:
    """[B, N, rows, H] -> [B, K, G * rows, H] in the type of computation, times `factor`."""
    x_BNRH = x_BNRH.to(compute or _compute_type(x_BNRH))
    x_BNRH = x_BNRH if factor is None else x_BNRH * factor
    return x_BNRH.reshape(x_BNRH.shape[0], key_heads, -1, x_BNRH.shape[3])


def _mask(s_BKRC: Tensor, rows: slice, keys: slice, causal: bool, start_BT: Tensor | None) -> None:
    """Buries the scores of keys after their query, which only the last columns have, and before its document."""
    size = rows.stop - rows.start
    s_BKGRC = s_BKRC.unflatten(2, (-1, size))
    if causal:
        hidden = torch.full((size, size), MASKED, dtype=s_BKRC.dtype, device=s_BKRC.device).triu_(1)
        s_BKGRC[..., rows.start - keys.start : rows.stop - keys.start] += hidden
    if start_BT is not None:
        key_C = torch.arange(keys.start, keys.stop, device=s_BKRC.device)
        s_BKGRC += MASKED * (key_C < start_BT[:, None, None, rows, None])
