"""The causal backward of short sequences in one kernel: one program owns a whole head. Deterministic.

Scores are recomputed once, not twice as by the kernels that own queries or keys: five products a tile in place of seven. dQ of
a block of rows is complete when the program reaches the keys on its diagonal; until then its sum waits in float32 in a
scratch buffer, which no other program touches.
"""

import triton
import triton.language as tl

from model.entropy_attention.triton_tiles import (
    LN2,
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
    output, grad_output, batch, head, entropy, grad_entropy, slope, offset, factors, scale_log2, tokens,
    CHECK: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Works out slope and offset of every row before the keys are walked through."""
    for m in tl.range(0, tokens, BLOCK_M):
        o = load_rows(output, batch, head, m)
        do = load_rows(grad_output, batch, head, m)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        factor = logit_factor(factors, head, m, tokens, scale_log2, MODE, BLOCK_M, CHECK)
        row_entropy, row_grad = delta, delta
        if ENTROPY:
            row_entropy = load_vector(entropy, m, tokens, 0.0, BLOCK_M, CHECK)
            row_grad = load_vector(grad_entropy, m, tokens, 0.0, BLOCK_M, CHECK)
        row_slope, row_const = row_constants(delta, row_entropy, row_grad, factor, MODE, ENTROPY)
        store_vector(offset, row_const, m, tokens, BLOCK_M, CHECK)
        if ENTROPY:
            store_vector(slope, row_slope, m, tokens, BLOCK_M, CHECK)


@triton.jit
def _all_gradients(
    dk, dv, k, v, query, grad_output, grad_query, scratch, batch, head, lse, slope, offset, score_gradient,
    factors, scale_log2, factor, first_key, start, stop, tokens,
    DIAGONAL: tl.constexpr, CHECK: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, HP: tl.constexpr, KEY_MAJOR: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Adds query rows start .. stop to dk and dv, and these keys to dQ, which is complete on the diagonal."""
    for m in tl.range(start, stop, BLOCK_M):
        q = load_rows(query, batch, head, m)
        do = load_rows(grad_output, batch, head, m)
        row_lse = load_vector(lse, m, tokens, 0.0, BLOCK_M, CHECK)
        row_const = load_vector(offset, m, tokens, 0.0, BLOCK_M, CHECK)
        row_slope = load_vector(slope, m, tokens, 0.0, BLOCK_M, CHECK) if ENTROPY else row_const
        if MODE == 2:
            factor = logit_factor(factors, head, m, tokens, scale_log2, MODE, BLOCK_M, CHECK)
        p, ds = score_tile(
            q, k, v, do, row_lse, row_slope, row_const, factor, m, first_key, tokens,
            DIAGONAL, KEY_MAJOR, True, ENTROPY, MODE, PRECISION,
        )  # fmt: skip
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv = tl.dot(p if KEY_MAJOR else tl.trans(p), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds if KEY_MAJOR else tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds) if KEY_MAJOR else ds, k, input_precision=PRECISION)
        partial = scratch + (m + tl.arange(0, BLOCK_M))[:, None] * HP + tl.arange(0, HP)[None, :]
        if not SINGLE:
            if first_key > 0:
                dq += tl.load(partial)
        if DIAGONAL:
            dq *= LN2 if MODE == 2 else LN2 * factor
            store_rows(grad_query, batch, head, m, dq)
            if MODE != 0:
                store_vector(score_gradient, tl.sum(q.to(tl.float32) * dq, 1), m, tokens, BLOCK_M, CHECK)
        else:
            tl.store(partial, dq)
    return dk, dv


@triton.jit
def fused_kernel(
    query, key, value, output, grad_output, grad_query, grad_key, grad_value, scratch, lse, entropy, grad_entropy,
    slope, offset, factors, score_gradient, scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, HP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_MAJOR: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """All gradients of one key head and the query heads that share it. BLOCK_N must be a multiple of BLOCK_M.

    scratch: float32 [B, N, rows, HP], rows being T rounded up to BLOCK_N.
    """
    CHECK: tl.constexpr = not EVEN
    program = tl.program_id(0)
    key_heads = heads // group
    batch, key_head = program // key_heads, program % key_heads
    scratch_rows = tl.cdiv(tokens, BLOCK_N) * BLOCK_N
    for member in tl.range(0, group):
        head = key_head * group + member
        row_offset = (batch.to(tl.int64) * heads + head) * tokens
        _row_constants_of_head(
            output, grad_output, batch, head, entropy + row_offset, grad_entropy + row_offset, slope + row_offset,
            offset + row_offset, factors, scale_log2, tokens, CHECK, ENTROPY, MODE, BLOCK_M,
        )  # fmt: skip
    # a temperature per head means one query head per key head here
    factor = logit_factor(factors, key_head, 0, tokens, scale_log2, MODE, BLOCK_M, True)
    for first_key in tl.range(0, tokens, BLOCK_N):
        tl.debug_barrier()  # what one thread wrote to scratch and constants another may read
        k = load_rows(key, batch, key_head, first_key)
        v = load_rows(value, batch, key_head, first_key)
        dk = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
        dv = tl.zeros([BLOCK_N, HP], dtype=tl.float32)
        for member in tl.range(0, group):
            head = key_head * group + member
            row_offset = (batch.to(tl.int64) * heads + head) * tokens
            partial = scratch + (batch.to(tl.int64) * heads + head) * scratch_rows * HP
            unmasked = tl.minimum(first_key + BLOCK_N, tokens)
            dk, dv = _all_gradients(
                dk, dv, k, v, query, grad_output, grad_query, partial, batch, head, lse + row_offset,
                slope + row_offset, offset + row_offset, score_gradient + row_offset, factors, scale_log2, factor,
                first_key, first_key, unmasked, tokens,
                True, CHECK, ENTROPY, MODE, PRECISION, BLOCK_M, HP, KEY_MAJOR, SINGLE,
            )  # fmt: skip
            if not SINGLE:
                dk, dv = _all_gradients(
                    dk, dv, k, v, query, grad_output, grad_query, partial, batch, head, lse + row_offset,
                    slope + row_offset, offset + row_offset, score_gradient + row_offset, factors, scale_log2,
                    factor, first_key, first_key + BLOCK_N, tokens, tokens,
                    False, CHECK, ENTROPY, MODE, PRECISION, BLOCK_M, HP, KEY_MAJOR, SINGLE,
                )  # fmt: skip
        dk *= LN2 if MODE == 2 else LN2 * factor
        store_rows(grad_key, batch, key_head, first_key, dk)
        store_rows(grad_value, batch, key_head, first_key, dv)
