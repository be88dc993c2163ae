"""The backward in two kernels: one owns blocks of queries (dQ), one owns blocks of keys (dK, dV). Deterministic, any T.

Both recompute the probabilities from the saved log-sum-exp. The first also works out the two constants of each row that
the entropy and the softmax need, for the second to read.
"""

import triton
import triton.language as tl

from model.entropy_attention.triton_tiles import (
    LN2,
    along_rows,
    load_rows,
    load_vector,
    logit_factor,
    row_constants,
    score_tile,
    store_rows,
    store_vector,
)


@triton.jit
def _query_gradient(
    dq, ds_x, mean_x, q, do, key, value, batch, key_head, peak, log_sum, slope, offset, factor, row_start, first_row,
    start, stop, tokens,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds dS k of keys start .. stop to dq, and with a temperature dS (x - mean_x) to ds_x."""
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(key, batch, key_head, n)
        v = load_rows(value, batch, key_head, n)
        x, _, ds = score_tile(
            q, k, v, do, peak, log_sum, slope, offset, factor, row_start, first_row, n, tokens,
            MASK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT,
        )  # fmt: skip
        if MODE != 0:
            ds_x += tl.sum(ds * (x - mean_x[:, None] if ENTROPY else x), 1)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq, ds_x


@triton.jit
def _mean_gradient(
    mean, q, do, key, value, batch, key_head, peak, log_sum, slope, factor, row_start, first_row, start, stop, tokens,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds sum_j p_j g_j of keys start .. stop, where dS_j = p_j (g_j - that sum over all keys)."""
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(key, batch, key_head, n)
        v = load_rows(value, batch, key_head, n)
        _, _, pg = score_tile(
            q, k, v, do, peak, log_sum, slope, slope * 0, factor, row_start, first_row, n, tokens,
            MASK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT,
        )  # fmt: skip
        mean += tl.sum(pg, 1)
    return mean


@triton.jit
def query_kernel(
    query, key, value, output, grad_output, grad_query, peak, log_sum, entropy, grad_entropy, slope, offset,
    temperature, document_start, row_grad_temperature, scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, the row constants, and each row's part of the temperature's gradient, of BLOCK_M rows of one query head.

    EXACT takes sum_j p_j g_j over the very scores that dS is made of, one more pass over the keys, where rowsum(dO o O)
    would leave a rounding error in rows that attend to a single key and whose dS is 0.

    dL/dt_i = -(1/t_i) sum_j dS_ij s_ij. Since sum_j dS_ij = 0, s may be taken from anywhere: from its mean, which is -H
    for ln p, so that an error of the row's constant, p_ij times which is in every dS_ij, does not enter.
    """
    CHECK: tl.constexpr = not EVEN
    blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    first_row = (blocks - 1 - program % blocks) * BLOCK_M
    batch, head = (program // blocks) // heads, (program // blocks) % heads
    key_head = head // group
    row_offset = (program // blocks).to(tl.int64) * tokens

    q = load_rows(query, batch, head, first_row)
    do = load_rows(grad_output, batch, head, first_row)
    o = load_rows(output, batch, head, first_row)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    factor = logit_factor(temperature, head, first_row, tokens, scale_log2, MODE, BLOCK_M, CHECK)
    row_peak = load_vector(peak + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
    row_log_sum = load_vector(log_sum + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
    row_entropy, row_grad = delta, delta
    if ENTROPY:
        row_entropy = load_vector(entropy + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
        row_grad = load_vector(grad_entropy + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
    row_slope, row_const = row_constants(delta, row_entropy, row_grad, ENTROPY)
    start = 0
    stop = tl.minimum(first_row + BLOCK_M, tokens) if CAUSAL else tokens
    row_start = first_row
    if DOCUMENTS:
        document_start += batch.to(tl.int64) * tokens
        row_start = load_vector(document_start, first_row, tokens, 0, BLOCK_M, CHECK)
        start = (tl.load(document_start + first_row) // BLOCK_N) * BLOCK_N
    # One loop that masks every tile. A second loop, for the tiles that all rows see, costs more than the masks it saves
    # here; in the other kernels it does not.
    MASK: tl.constexpr = CAUSAL or DOCUMENTS or CHECK
    if EXACT:
        mean = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_const = -_mean_gradient(
            mean, q, do, key, value, batch, key_head, row_peak, row_log_sum, row_slope, factor, row_start, first_row,
            start, stop, tokens, MASK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT, BLOCK_N,
        )  # fmt: skip
    store_vector(offset + row_offset, row_const, first_row, tokens, BLOCK_M, CHECK)
    if ENTROPY:
        store_vector(slope + row_offset, row_slope, first_row, tokens, BLOCK_M, CHECK)

    dq = tl.zeros([BLOCK_M, HP], dtype=tl.float32)
    ds_x = tl.zeros([BLOCK_M], dtype=tl.float32)
    dq, ds_x = _query_gradient(
        dq, ds_x, row_entropy / -LN2, q, do, key, value, batch, key_head, row_peak, row_log_sum, row_slope, row_const,
        factor, row_start, first_row, start, stop, tokens, MASK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT, BLOCK_N,
    )  # fmt: skip
    dq *= LN2 * along_rows(factor, MODE)
    store_rows(grad_query, batch, head, first_row, dq)
    if MODE != 0:
        ds_x *= -LN2 * factor / scale_log2
        store_vector(row_grad_temperature + row_offset, ds_x, first_row, tokens, BLOCK_M, CHECK)


@triton.jit
def _key_gradients(
    dk, dv, k, v, query, grad_output, batch, head, peak, log_sum, slope, offset, temperature, document_start,
    scale_log2, factor, first_key, start, stop, tokens,
    MASK: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds query rows start .. stop to dk and dv."""
    for m in tl.range(start, stop, BLOCK_M):
        q = load_rows(query, batch, head, m)
        do = load_rows(grad_output, batch, head, m)
        row_peak = load_vector(peak, m, tokens, 0.0, BLOCK_M, CHECK)
        row_log_sum = load_vector(log_sum, m, tokens, 0.0, BLOCK_M, CHECK)
        row_const = load_vector(offset, m, tokens, 0.0, BLOCK_M, CHECK)
        row_slope = load_vector(slope, m, tokens, 0.0, BLOCK_M, CHECK) if ENTROPY else row_const
        if MODE == 2:
            factor = logit_factor(temperature, head, m, tokens, scale_log2, MODE, BLOCK_M, CHECK)
        row_start = load_vector(document_start, m, tokens, 0, BLOCK_M, CHECK) if DOCUMENTS else m
        _, p, ds = score_tile(
            q, k, v, do, row_peak, row_log_sum, row_slope, row_const, factor, row_start, m, first_key, tokens,
            MASK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT,
        )  # fmt: skip
        if MODE == 2:
            ds *= factor[:, None]
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv = tl.dot(tl.trans(p), do, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_kernel(
    query, key, value, grad_output, grad_key, grad_value, peak, log_sum, slope, offset, temperature, document_start,
    document_stop, scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head, over all the query heads that share it.

    `document_stop` [B, blocks of keys] is the first row whose document begins after the block.
    """
    CHECK: tl.constexpr = not EVEN
    blocks = tl.cdiv(tokens, BLOCK_N)
    program = tl.program_id(0)
    first_key = (program % blocks) * BLOCK_N
    key_heads = heads // group
    batch, key_head = (program // blocks) // key_heads, (program // blocks) % key_heads

    k = load_rows(key, batch, key_head, first_key)
    v = load_rows(value, batch, key_head, first_key)
    dk = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
    # a temperature per head means one query head per key head here, so that its factor can wait until the end
    factor = logit_factor(temperature, key_head, 0, tokens, scale_log2, MODE, BLOCK_M, True)
    start = (first_key // BLOCK_M) * BLOCK_M if CAUSAL else 0
    # rows from here on see every key of the block; without the causal mask only the last block of keys has any to hide
    unmasked = first_key + BLOCK_N if CAUSAL else (0 if EVEN else tokens)
    unmasked = tl.minimum(tl.cdiv(unmasked, BLOCK_M) * BLOCK_M, tl.cdiv(tokens, BLOCK_M) * BLOCK_M)
    if DOCUMENTS:
        document_start += batch.to(tl.int64) * tokens
        unmasked = tl.load(document_stop + batch * blocks + first_key // BLOCK_N)
    for member in tl.range(0, group):
        head = key_head * group + member
        row_offset = (batch.to(tl.int64) * heads + head) * tokens
        for masked in tl.static_range(1, 0 if DOCUMENTS else -1, -1):
            first, last = (start, unmasked) if masked else (unmasked, tokens)
            dk, dv = _key_gradients(
                dk, dv, k, v, query, grad_output, batch, head, peak + row_offset, log_sum + row_offset,
                slope + row_offset, offset + row_offset, temperature, document_start, scale_log2, factor, first_key,
                first, last, tokens, masked == 1, CHECK, CAUSAL, DOCUMENTS, ENTROPY, MODE, EXACT, BLOCK_M,
            )  # fmt: skip
    dk *= LN2 if MODE == 2 else LN2 * factor
    store_rows(grad_key, batch, key_head, first_key, dk)
    store_rows(grad_value, batch, key_head, first_key, dv)
