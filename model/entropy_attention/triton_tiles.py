"""What the Triton kernels share: moving tiles, the factor of the logits, and the gradient of one tile of scores.

Inside the kernels logits are in powers of two, x = s / ln 2 = q . k * factor, since exp2 is the hardware's exponential.
The temperature mode is 0 (none), 1 (one per head: a number) or 2 (one per row: a vector).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)  # finite, so that exp2(MASKED) * MASKED is 0 and not NaN


@triton.jit
def load_rows(tensor, batch, head, start):
    """The descriptor's block of rows from `start` on, [BLOCK, HP]; zeros beyond the tensor's rows and columns."""
    return tensor.load([batch, head, start, 0]).reshape(tensor.block_shape[2], tensor.block_shape[3])


@triton.jit
def store_rows(tensor, batch, head, start, tile):
    """Writes a [BLOCK, HP] tile; what lies beyond the tensor's rows and columns is dropped."""
    tensor.store([batch, head, start, 0], tile.to(tensor.dtype).reshape(tensor.block_shape))


@triton.jit
def load_vector(pointer, start, tokens, other, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Elements start .. start + BLOCK of a row vector [T]."""
    rows = start + tl.arange(0, BLOCK)
    return tl.load(pointer + rows, mask=rows < tokens, other=other) if CHECK else tl.load(pointer + rows)


@triton.jit
def store_vector(pointer, vector, start, tokens, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Store a value for each token of a tile; with CHECK, only for tokens of the sequence."""
    rows = start + tl.arange(0, BLOCK)
    if CHECK:
        tl.store(pointer + rows, vector, mask=rows < tokens)
    else:
        tl.store(pointer + rows, vector)


@triton.jit
def logit_factor(
    temperature, head, start, tokens, scale_log2, MODE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):
    """scale / (t ln 2): what q . k is multiplied by. A number, or with a temperature per row a vector [BLOCK]."""
    if MODE == 0:
        factor = scale_log2
    elif MODE == 1:
        factor = scale_log2 / tl.load(temperature + head)
    else:
        factor = scale_log2 / load_vector(temperature + head.to(tl.int64) * tokens, start, tokens, 1.0, BLOCK, CHECK)
    return factor


@triton.jit
def along_rows(vector, MODE: tl.constexpr):
    """A row vector (in modes 0 and 1 a number) ready to broadcast over a tile of scores [rows, keys]."""
    return vector[:, None] if MODE == 2 else vector


@triton.jit
def visible(
    first_row,
    first_key,
    row_start,
    tokens,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which keys of a tile [rows, keys] their rows attend to; `row_start` is the first of each row's document."""
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None]
    keys = (first_key + tl.arange(0, BLOCK_N))[None, :]
    seen = (keys <= rows) if CAUSAL else (keys < tokens)
    return (seen & (keys >= row_start[:, None])) if DOCUMENTS else seen


@triton.jit
def row_constants(delta, entropy, grad_entropy, ENTROPY: tl.constexpr):
    """(slope, offset) such that dS = p (dP + slope * log2 p + offset).

    With delta = rowsum(dO o O): dS = p (dP - delta - dH (s - lse + H)), and s - lse = ln 2 * log2 p.
    """
    offset = -delta
    slope = offset
    if ENTROPY:
        offset -= grad_entropy * entropy
        slope = -LN2 * grad_entropy
    return slope, offset


@triton.jit
def score_tile(
    q, k, v, do, peak, log_sum, slope, offset, factor, row_start, first_row, first_key, tokens,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Logarithms x = log2 p of the probabilities, p, and score gradients dS of one tile [rows, keys].

    x = ((q . k - peak) * factor - log_sum: a row's largest q . k goes first, as in the forward.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    x = (scores - peak[:, None]) * along_rows(factor, MODE) - log_sum[:, None]
    p = tl.exp2(x)
    if MASK:
        p = tl.where(
            visible(first_row, first_key, row_start, tokens, CAUSAL, DOCUMENTS, q.shape[0], k.shape[0]), p, 0.0
        )
    # Triton starts the sum of dp at what is added to it, which rounds each sum otherwise. In a row that attends to one
    # key dP and the offset cancel, exactly only if dP was summed as in the offset.
    if EXACT:
        ds = p * (dp + x * slope[:, None] if ENTROPY else dp) + p * offset[:, None]
    elif ENTROPY:
        ds = p * (dp + (x * slope[:, None] + offset[:, None]))
    else:
        ds = p * (dp + offset[:, None])
    return x, p, ds
