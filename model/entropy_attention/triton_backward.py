"""The backward in two kernels: one owns blocks of queries (dQ), one owns blocks of keys (dK, dV). Deterministic, any T.

Both recompute the probabilities from the saved log-sum-exp. The first also works out the two constants of each row that the
entropy and the softmax need, for the second to read.
"""

import triton
import triton.language as tl

from model.entropy_attention.triton_tiles import (
    LN2,
    along_rows,
    head_offset,
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
    dq, q, do, k_ptr, v_ptr, stride_kt, stride_vt, lse, slope, offset, factor, first_row, start, stop, tokens,
    MASK: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds dS k of keys start .. stop to dq."""
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(k_ptr, n, stride_kt, tokens, BLOCK_N, H, HP, CHECK)
        v = load_rows(v_ptr, n, stride_vt, tokens, BLOCK_N, H, HP, CHECK)
        _, ds = score_tile(
            q, k, v, do, lse, slope, offset, factor, first_row, n, tokens, MASK, False, CAUSAL, ENTROPY, MODE, PRECISION
        )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, entropy_ptr, grad_entropy_ptr, slope_ptr, offset_ptr,
    temperature, score_gradient_ptr,
    stride_qb, stride_qn, stride_qt, stride_kb, stride_kn, stride_kt, stride_vb, stride_vn, stride_vt,
    stride_ob, stride_on, stride_ot, stride_dob, stride_don, stride_dot, stride_dqb, stride_dqn, stride_dqt,
    scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, the row constants, and with a temperature sum_j dS_ij s_ij, of BLOCK_M rows of one query head."""
    CHECK: tl.constexpr = not EVEN
    blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    first_row = (blocks - 1 - program % blocks) * BLOCK_M
    batch, head = (program // blocks) // heads, (program // blocks) % heads
    k_ptr += head_offset(batch, head // group, stride_kb, stride_kn)
    v_ptr += head_offset(batch, head // group, stride_vb, stride_vn)
    row_offset = (program // blocks).to(tl.int64) * tokens

    q = load_rows(
        q_ptr + head_offset(batch, head, stride_qb, stride_qn), first_row, stride_qt, tokens, BLOCK_M, H, HP, CHECK
    )
    do = load_rows(
        do_ptr + head_offset(batch, head, stride_dob, stride_don), first_row, stride_dot, tokens, BLOCK_M, H, HP, CHECK
    )
    o = load_rows(
        o_ptr + head_offset(batch, head, stride_ob, stride_on), first_row, stride_ot, tokens, BLOCK_M, H, HP, CHECK
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    factor = logit_factor(temperature, head, first_row, tokens, scale_log2, MODE, BLOCK_M, CHECK)
    lse = load_vector(lse_ptr + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
    entropy, grad_entropy = delta, delta
    if ENTROPY:
        entropy = load_vector(entropy_ptr + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
        grad_entropy = load_vector(grad_entropy_ptr + row_offset, first_row, tokens, 0.0, BLOCK_M, CHECK)
    slope, offset = row_constants(delta, entropy, grad_entropy, factor, MODE, ENTROPY)
    store_vector(offset_ptr + row_offset, offset, first_row, tokens, BLOCK_M, CHECK)
    if ENTROPY:
        store_vector(slope_ptr + row_offset, slope, first_row, tokens, BLOCK_M, CHECK)

    dq = tl.zeros([BLOCK_M, HP], dtype=tl.float32)
    stop = tl.minimum(first_row + BLOCK_M, tokens) if CAUSAL else tokens
    unmasked = ((first_row if CAUSAL else tokens) // BLOCK_N) * BLOCK_N
    dq = _query_gradient(
        dq, q, do, k_ptr, v_ptr, stride_kt, stride_vt, lse, slope, offset, factor, first_row, 0, unmasked, tokens,
        False, False, CAUSAL, ENTROPY, MODE, PRECISION, H, HP, BLOCK_N,
    )  # fmt: skip
    dq = _query_gradient(
        dq, q, do, k_ptr, v_ptr, stride_kt, stride_vt, lse, slope, offset, factor, first_row, unmasked, stop, tokens,
        True, CHECK, CAUSAL, ENTROPY, MODE, PRECISION, H, HP, BLOCK_N,
    )  # fmt: skip
    dq *= LN2 if MODE == 2 else LN2 * factor
    dq_ptr += head_offset(batch, head, stride_dqb, stride_dqn)
    store_rows(dq_ptr, dq, first_row, stride_dqt, tokens, BLOCK_M, H, HP, CHECK)
    if MODE != 0:
        store_vector(
            score_gradient_ptr + row_offset, tl.sum(q.to(tl.float32) * dq, 1), first_row, tokens, BLOCK_M, CHECK
        )


@triton.jit
def _key_gradients(
    dk, dv, k, v, q_ptr, do_ptr, stride_qt, stride_dot, lse_ptr, slope_ptr, offset_ptr, temperature, head,
    scale_log2, factor, first_key, start, stop, tokens,
    MASK: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """Adds query rows start .. stop to dk and dv."""
    for m in tl.range(start, stop, BLOCK_M):
        q = load_rows(q_ptr, m, stride_qt, tokens, BLOCK_M, H, HP, CHECK)
        do = load_rows(do_ptr, m, stride_dot, tokens, BLOCK_M, H, HP, CHECK)
        lse = load_vector(lse_ptr, m, tokens, 0.0, BLOCK_M, CHECK)
        offset = load_vector(offset_ptr, m, tokens, 0.0, BLOCK_M, CHECK)
        slope = load_vector(slope_ptr, m, tokens, 0.0, BLOCK_M, CHECK) if ENTROPY else offset
        if MODE == 2:
            factor = logit_factor(temperature, head, m, tokens, scale_log2, MODE, BLOCK_M, CHECK)
        p, ds = score_tile(
            q, k, v, do, lse, slope, offset, factor, m, first_key, tokens,
            MASK, KEY_MAJOR, CAUSAL, ENTROPY, MODE, PRECISION,
        )  # fmt: skip
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv = tl.dot(p if KEY_MAJOR else tl.trans(p), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds if KEY_MAJOR else tl.trans(ds), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, slope_ptr, offset_ptr, temperature,
    stride_qb, stride_qn, stride_qt, stride_kb, stride_kn, stride_kt, stride_vb, stride_vn, stride_vt,
    stride_dob, stride_don, stride_dot, stride_dkb, stride_dkn, stride_dkt, stride_dvb, stride_dvn, stride_dvt,
    scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head, over all the query heads that share it."""
    CHECK: tl.constexpr = not EVEN
    blocks = tl.cdiv(tokens, BLOCK_N)
    program = tl.program_id(0)
    first_key = (program % blocks) * BLOCK_N
    key_heads = heads // group
    batch, key_head = (program // blocks) // key_heads, (program // blocks) % key_heads

    k_ptr += head_offset(batch, key_head, stride_kb, stride_kn)
    v_ptr += head_offset(batch, key_head, stride_vb, stride_vn)
    k = load_rows(k_ptr, first_key, stride_kt, tokens, BLOCK_N, H, HP, CHECK)
    v = load_rows(v_ptr, first_key, stride_vt, tokens, BLOCK_N, H, HP, CHECK)
    dk = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
    # a temperature per head means one query head per key head here, so that its factor can wait until the end
    factor = logit_factor(temperature, key_head, 0, tokens, scale_log2, MODE, BLOCK_M, True)
    start = (first_key // BLOCK_M) * BLOCK_M if CAUSAL else 0
    # rows from here on see every key of the block; without the causal mask only the last block of keys has any to hide
    unmasked = first_key + BLOCK_N if CAUSAL else (0 if EVEN else tokens)
    unmasked = tl.minimum(tl.cdiv(unmasked, BLOCK_M) * BLOCK_M, tl.cdiv(tokens, BLOCK_M) * BLOCK_M)
    for member in tl.range(0, group):
        head = key_head * group + member
        q_head = q_ptr + head_offset(batch, head, stride_qb, stride_qn)
        do_head = do_ptr + head_offset(batch, head, stride_dob, stride_don)
        row_offset = (batch.to(tl.int64) * heads + head) * tokens
        dk, dv = _key_gradients(
            dk, dv, k, v, q_head, do_head, stride_qt, stride_dot, lse_ptr + row_offset, slope_ptr + row_offset,
            offset_ptr + row_offset, temperature, head, scale_log2, factor, first_key, start, unmasked, tokens,
            True, CHECK, CAUSAL, ENTROPY, MODE, PRECISION, H, HP, BLOCK_M, KEY_MAJOR,
        )  # fmt: skip
        dk, dv = _key_gradients(
            dk, dv, k, v, q_head, do_head, stride_qt, stride_dot, lse_ptr + row_offset, slope_ptr + row_offset,
            offset_ptr + row_offset, temperature, head, scale_log2, factor, first_key, unmasked, tokens, tokens,
            False, CHECK, CAUSAL, ENTROPY, MODE, PRECISION, H, HP, BLOCK_M, KEY_MAJOR,
        )  # fmt: skip
    dk *= LN2 if MODE == 2 else LN2 * factor
    dk_ptr += head_offset(batch, key_head, stride_dkb, stride_dkn)
    dv_ptr += head_offset(batch, key_head, stride_dvb, stride_dvn)
    store_rows(dk_ptr, dk, first_key, stride_dkt, tokens, BLOCK_N, H, HP, CHECK)
    store_rows(dv_ptr, dv, first_key, stride_dvt, tokens, BLOCK_N, H, HP, CHECK)
