"""The causal backward of short sequences in one kernel: one program owns a whole head. Deterministic.

Scores are recomputed once, not twice as by the kernels that own queries or keys: five products a tile in place of seven. dQ of
a block of rows is complete when the program reaches the keys on its diagonal; until then its sum waits in float32 in a
scratch buffer, which no other program touches.
"""

import triton
import triton.language as tl

from model.entropy_attention.triton_tiles import (
    LN2,
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
def _row_constants_of_head(
    o_ptr, do_ptr, stride_ot, stride_dot, entropy_ptr, grad_entropy_ptr, slope_ptr, offset_ptr, temperature, head,
    scale_log2, tokens, CHECK: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Works out slope and offset of every row before the keys are walked through."""
    for m in tl.range(0, tokens, BLOCK_M):
        o = load_rows(o_ptr, m, stride_ot, tokens, BLOCK_M, H, HP, CHECK)
        do = load_rows(do_ptr, m, stride_dot, tokens, BLOCK_M, H, HP, CHECK)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        factor = logit_factor(temperature, head, m, tokens, scale_log2, MODE, BLOCK_M, CHECK)
        entropy, grad_entropy = delta, delta
        if ENTROPY:
            entropy = load_vector(entropy_ptr, m, tokens, 0.0, BLOCK_M, CHECK)
            grad_entropy = load_vector(grad_entropy_ptr, m, tokens, 0.0, BLOCK_M, CHECK)
        slope, offset = row_constants(delta, entropy, grad_entropy, factor, MODE, ENTROPY)
        store_vector(offset_ptr, offset, m, tokens, BLOCK_M, CHECK)
        if ENTROPY:
            store_vector(slope_ptr, slope, m, tokens, BLOCK_M, CHECK)


@triton.jit
def _all_gradients(
    dk, dv, k, v, q_ptr, do_ptr, dq_ptr, scratch_ptr, stride_qt, stride_dot, stride_dqt, lse_ptr, slope_ptr,
    offset_ptr, score_gradient_ptr, temperature, head, scale_log2, factor, first_key, start, stop, tokens,
    DIAGONAL: tl.constexpr, CHECK: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, KEY_MAJOR: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Adds query rows start .. stop to dk and dv, and these keys to dQ, which is complete on the diagonal."""
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
            DIAGONAL, KEY_MAJOR, True, ENTROPY, MODE, PRECISION,
        )  # fmt: skip
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv = tl.dot(p if KEY_MAJOR else tl.trans(p), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds if KEY_MAJOR else tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds) if KEY_MAJOR else ds, k, input_precision=PRECISION)
        if not SINGLE:
            if first_key > 0:
                dq += load_rows(scratch_ptr, m, HP, tokens, BLOCK_M, HP, HP, CHECK)
        if DIAGONAL:
            dq *= LN2 if MODE == 2 else LN2 * factor
            store_rows(dq_ptr, dq, m, stride_dqt, tokens, BLOCK_M, H, HP, CHECK)
            if MODE != 0:
                store_vector(score_gradient_ptr, tl.sum(q.to(tl.float32) * dq, 1), m, tokens, BLOCK_M, CHECK)
        else:
            store_rows(scratch_ptr, dq, m, HP, tokens, BLOCK_M, HP, HP, CHECK)
    return dk, dv


@triton.jit
def fused_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, scratch_ptr,
    lse_ptr, entropy_ptr, grad_entropy_ptr, slope_ptr, offset_ptr, temperature, score_gradient_ptr,
    stride_qb, stride_qn, stride_qt, stride_kb, stride_kn, stride_kt, stride_vb, stride_vn, stride_vt,
    stride_ob, stride_on, stride_ot, stride_dob, stride_don, stride_dot, stride_dqb, stride_dqn, stride_dqt,
    stride_dkb, stride_dkn, stride_dkt, stride_dvb, stride_dvn, stride_dvt, scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_MAJOR: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """All gradients of one key head and the query heads that share it. BLOCK_N must be a multiple of BLOCK_M."""
    CHECK: tl.constexpr = not EVEN
    program = tl.program_id(0)
    key_heads = heads // group
    batch, key_head = program // key_heads, program % key_heads
    k_ptr += head_offset(batch, key_head, stride_kb, stride_kn)
    v_ptr += head_offset(batch, key_head, stride_vb, stride_vn)
    dk_ptr += head_offset(batch, key_head, stride_dkb, stride_dkn)
    dv_ptr += head_offset(batch, key_head, stride_dvb, stride_dvn)
    for member in tl.range(0, group):
        head = key_head * group + member
        row_offset = (batch.to(tl.int64) * heads + head) * tokens
        _row_constants_of_head(
            o_ptr + head_offset(batch, head, stride_ob, stride_on),
            do_ptr + head_offset(batch, head, stride_dob, stride_don),
            stride_ot, stride_dot, entropy_ptr + row_offset, grad_entropy_ptr + row_offset, slope_ptr + row_offset,
            offset_ptr + row_offset, temperature, head, scale_log2, tokens, CHECK, ENTROPY, MODE, H, HP, BLOCK_M,
        )  # fmt: skip
    # a temperature per head means one query head per key head here
    factor = logit_factor(temperature, key_head, 0, tokens, scale_log2, MODE, BLOCK_M, True)
    for first_key in tl.range(0, tokens, BLOCK_N):
        tl.debug_barrier()  # what one thread wrote to scratch and constants another may read
        k = load_rows(k_ptr, first_key, stride_kt, tokens, BLOCK_N, H, HP, CHECK)
        v = load_rows(v_ptr, first_key, stride_vt, tokens, BLOCK_N, H, HP, CHECK)
        dk = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
        dv = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
        for member in tl.range(0, group):
            head = key_head * group + member
            row_offset = (batch.to(tl.int64) * heads + head) * tokens
            q_head = q_ptr + head_offset(batch, head, stride_qb, stride_qn)
            do_head = do_ptr + head_offset(batch, head, stride_dob, stride_don)
            dq_head = dq_ptr + head_offset(batch, head, stride_dqb, stride_dqn)
            unmasked = tl.minimum(first_key + BLOCK_N, tokens)
            dk, dv = _all_gradients(
                dk, dv, k, v, q_head, do_head, dq_head, scratch_ptr + row_offset * HP, stride_qt, stride_dot,
                stride_dqt, lse_ptr + row_offset, slope_ptr + row_offset, offset_ptr + row_offset,
                score_gradient_ptr + row_offset, temperature, head, scale_log2, factor, first_key, first_key, unmasked,
                tokens, True, CHECK, ENTROPY, MODE, PRECISION, H, HP, BLOCK_M, KEY_MAJOR, SINGLE,
            )  # fmt: skip
            if not SINGLE:
                dk, dv = _all_gradients(
                    dk, dv, k, v, q_head, do_head, dq_head, scratch_ptr + row_offset * HP, stride_qt, stride_dot,
                    stride_dqt, lse_ptr + row_offset, slope_ptr + row_offset, offset_ptr + row_offset,
                    score_gradient_ptr + row_offset, temperature, head, scale_log2, factor, first_key,
                    first_key + BLOCK_N, tokens, tokens, False, CHECK, ENTROPY, MODE, PRECISION, H, HP, BLOCK_M,
                    KEY_MAJOR, SINGLE,
                )  # fmt: skip
        dk *= LN2 if MODE == 2 else LN2 * factor
        store_rows(dk_ptr, dk, first_key, stride_dkt, tokens, BLOCK_N, H, HP, CHECK)
        store_rows(dv_ptr, dv, first_key, stride_dvt, tokens, BLOCK_N, H, HP, CHECK)
