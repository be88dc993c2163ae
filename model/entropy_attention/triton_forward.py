"""The forward kernel: online softmax whose third running sum gives the entropy of each row.

For a row with products q . k_j, m the largest of them so far, x_j = (q . k_j - m) * factor and e_j = exp2(x_j), it
carries sum_j e_j, sum_j e_j v_j and w = sum_j e_j x_j. When the maximum grows, all x fall by some d, and all three are
rescaled by exp2(-d), after w has taken -d * sum_j e_j. Then H = ln 2 (log2 sum - w / sum), without the cancellation of
ln sum_j exp(s_j) - sum_j p_j s_j.

The maximum is subtracted before the factor, so that the largest score gives exactly 0: the difference of two products
is rounded to some units in their last place, which for scores of 1e10 is enough to overflow exp2.
"""

import triton
import triton.language as tl

from model.entropy_attention.triton_tiles import (
    LN2,
    MASKED,
    along_rows,
    load_rows,
    load_vector,
    logit_factor,
    store_rows,
    store_vector,
    visible,
)


@triton.jit
def _attend(
    acc, row_sum, moment, row_max, q, key, value, batch, key_head, factor, row_start, first_row, start, stop, tokens,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Takes keys start .. stop into the running sums of one block of rows."""
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(key, batch, key_head, n)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASK:
            seen = visible(first_row, n, row_start, tokens, CAUSAL, DOCUMENTS, BLOCK_M, BLOCK_N)
            scores = tl.where(seen, scores, MASKED)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        x = (scores - new_max[:, None]) * along_rows(factor, MODE)
        e = tl.exp2(x)
        if DOCUMENTS:  # a row may meet whole tiles of keys before it meets its own
            e = tl.where(seen, e, 0.0)
        fall = (row_max - new_max) * factor
        shrink = tl.exp2(fall)
        if ENTROPY:
            moment = shrink * (moment + row_sum * fall) + tl.sum(e * x, 1)
        row_sum = row_sum * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None]
        v = load_rows(value, batch, key_head, n)
        acc = tl.dot(e.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_sum, moment, row_max


@triton.jit
def forward_kernel(
    query, key, value, output, peak, log_sum, entropy, temperature, document_start, scale_log2, heads, group, tokens,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_M query rows of one head; the longest rows of a head come first."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    first_row = (blocks - 1 - program % blocks) * BLOCK_M
    batch, head = (program // blocks) // heads, (program // blocks) % heads
    key_head = head // group
    row_offset = (program // blocks).to(tl.int64) * tokens

    factor = logit_factor(temperature, head, first_row, tokens, scale_log2, MODE, BLOCK_M, not EVEN)
    q = load_rows(query, batch, head, first_row)
    # The maximum is taken of q . k, so a negative factor gives its sign to the query, which is exact. This also keeps
    # the query in registers, which leaves shared memory to the keys and values.
    sign = tl.where(factor < 0, -1.0, 1.0)
    if MODE != 0 or IN_REGISTERS:
        q = (q.to(tl.float32) * along_rows(sign, MODE)).to(q.dtype)
        factor = tl.abs(factor)

    acc = tl.zeros([BLOCK_M, HP], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    moment = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], MASKED, dtype=tl.float32)
    stop = tl.minimum(first_row + BLOCK_M, tokens) if CAUSAL else tokens
    unmasked = ((first_row if CAUSAL else tokens) // BLOCK_N) * BLOCK_N
    row_start = first_row
    if DOCUMENTS:
        document_start += batch.to(tl.int64) * tokens
        row_start = load_vector(document_start, first_row, tokens, 0, BLOCK_M, not EVEN)
        unmasked = (tl.load(document_start + first_row) // BLOCK_N) * BLOCK_N
    for masked in tl.static_range(1 if DOCUMENTS else 0, 2):  # first the keys that all rows see
        first, last = (unmasked, stop) if masked else (0, unmasked)
        acc, row_sum, moment, row_max = _attend(
            acc, row_sum, moment, row_max, q, key, value, batch, key_head, factor, row_start, first_row, first, last,
            tokens, masked == 1, CAUSAL, DOCUMENTS, ENTROPY, MODE, BLOCK_M, BLOCK_N, IN_REGISTERS,
        )  # fmt: skip

    store_rows(output, batch, head, first_row, acc / row_sum[:, None])
    log2_sum = tl.log2(row_sum)
    store_vector(peak + row_offset, row_max * sign, first_row, tokens, BLOCK_M, not EVEN)
    store_vector(log_sum + row_offset, log2_sum, first_row, tokens, BLOCK_M, not EVEN)
    if ENTROPY:
        nats = LN2 * (log2_sum - moment / row_sum)
        one_key = (first_row + tl.arange(0, BLOCK_M) == 0) if CAUSAL else (tl.arange(0, BLOCK_M) * 0 + tokens == 1)
        nats = tl.where((nats < 0) | one_key, 0.0, nats)  # rounding aside it is never negative; NaN stays NaN
        store_vector(entropy + row_offset, nats, first_row, tokens, BLOCK_M, not EVEN)
