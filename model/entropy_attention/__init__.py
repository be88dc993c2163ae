"""Softmax attention that also returns the entropy of every row, differentiable in both, without a T x T matrix."""

import importlib.util
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.entropy_attention import reference
from model.entropy_attention.operators import attention, separate

__all__ = ["entropy_attention", "joint_entropy_attention"]

Implementation = Literal["auto", "triton", "blocked", "reference"]
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def entropy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    temperature: Tensor | None = None,
    document_start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_entropy: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute attention and its row entropies, differentiable in both.

        a_ij = softmax_j(q_i . k_j * scale / t_i)        output_i = sum_j a_ij v_j        H_i = -sum_j a_ij ln a_ij

    float32 products are IEEE products; tf32 is never used, whatever PyTorch's matmul precision is. Backward passes are
    deterministic: no kernel adds atomically.

    Args:
        query: [B, N, T, H], any strides with a contiguous last dimension; the output has its memory order.
        key, value: [B, K, T, H]; head n attends to key head n // (N / K), so N must be a multiple of K.
        temperature: t, [N] or [N, T], which divides the logits of a query row (arXiv 2501.03489, section 4); learnable.
        document_start: [B, T] integers, the first key that each query position sees, for sequences packed of several
            documents. It must not decrease along T, and must leave every row a key (at most i if causal). Values are
            not checked, since that would wait for the device. Keys before it are skipped in blocks.
        scale: multiplies the logits; 1 / sqrt(H) by default.
        causal: whether query i sees only keys 0 .. i.
        return_entropy: False leaves all work for the entropy out.
        implementation: 'triton' (CUDA kernels), 'blocked' (PyTorch, linear memory), 'reference' (materialized), or
            'auto': Triton on a CUDA device if it is installed and supports the type, else blocked.

    Returns:
        Output [B, N, T, H] in the query's type, and entropy [B, N, T] in nats (float32, for float64 inputs float64), or
        None. A row with one key has entropy exactly 0.

    Raises:
        ValueError: shapes, types or the implementation's name do not fit together.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    _check(query, key, value, temperature, document_start, scale, implementation)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if implementation == "reference":
        return reference.attention(
            query,
            key,
            value,
            temperature,
            document_start,
            scale=scale,
            causal=causal,
            with_entropy=return_entropy,
        )
    if implementation == "auto":
        implementation = "triton" if _has_kernel(query) else "blocked"
    width = query.shape[-1]
    if implementation == "triton" and width * query.element_size() % 16:
        # the kernels move rows in units of 16 bytes; columns of zeros change no score
        step = 16 // query.element_size()
        query, key, value = (F.pad(x, (0, -width % step)) for x in (query, key, value))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, entropy = attention(
        [query, key, value], temperature, document_start, scale, causal, return_entropy, implementation
    )
    if output.shape[-1] != width:
        output = output[..., :width]
    return output, entropy if return_entropy else None


def joint_entropy_attention(
    qkv_TBN3H: Tensor, *, temperature: Tensor | None = None, document_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute causal `entropy_attention` of queries, keys and values in one tensor, as a joint projection returns them.

    The gradient is one tensor too, written in place. Three separate gradients would have to be copied into it.

    Args:
        qkv_TBN3H: query, key and value of each head.
        temperature, document_start: as for `entropy_attention`.

    Returns:
        Output [T, B, N, H], contiguous, and entropy [B, N, T] in nats.
    """
    device = qkv_TBN3H.device.type
    if torch.is_autocast_enabled(device):
        qkv_TBN3H = qkv_TBN3H.to(torch.get_autocast_dtype(device))
    query, key, value = separate([qkv_TBN3H])
    implementation = "triton" if _has_kernel(query) else "blocked"
    _check(query, key, value, temperature, document_start, None, implementation)
    width = query.shape[-1]
    if implementation == "triton" and width * query.element_size() % 16:
        output, entropy = entropy_attention(query, key, value, temperature=temperature, document_start=document_start)
        assert entropy is not None
    else:
        output, entropy = attention(
            [qkv_TBN3H.contiguous()], temperature, document_start, 1 / math.sqrt(width), True, True, implementation
        )
    return output.permute(2, 0, 1, 3), entropy


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in KERNEL_TYPES and query.shape[-1] <= 256 and HAS_TRITON


HAS_TRITON = importlib.util.find_spec("triton") is not None


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None,
    document_start: Tensor | None,
    scale: float | None,
    implementation: str,
) -> None:
    """Raise ValueError with the first fault of the arguments."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            f"entropy_attention: query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: "
            "expected [B, N, T, H] and twice [B, K, T, H]"
        )
    batch, heads, tokens, width = query.shape
    if key.shape[0] != batch or key.shape[2:] != query.shape[2:] or heads % key.shape[1]:
        raise ValueError(
            f"entropy_attention: key {list(key.shape)} does not fit query {list(query.shape)}: B, T and H must agree "
            "and the query's heads must be a multiple of the key's"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"entropy_attention: query, key, value are {query.dtype}, {key.dtype}, {value.dtype}: "
            "expected one floating-point type; cast them or run under autocast"
        )
    if temperature is not None and tuple(temperature.shape) not in ((heads,), (heads, tokens)):
        raise ValueError(
            f"entropy_attention: temperature {list(temperature.shape)}: expected [{heads}] (one per head) or "
            f"[{heads}, {tokens}] (one per head and position)"
        )
    if document_start is not None and (
        tuple(document_start.shape) != (batch, tokens)
        or document_start.is_floating_point()
        or document_start.device != query.device
    ):
        raise ValueError(
            f"entropy_attention: document_start is {document_start.dtype} {list(document_start.shape)} on "
            f"{document_start.device}: expected integers [{batch}, {tokens}] on {query.device}"
        )
    if scale is not None and scale <= 0:
        raise ValueError(f"entropy_attention: scale {scale} must be positive; negate the query instead")
    if implementation not in ("auto", "triton", "blocked", "reference"):
        raise ValueError(
            f"entropy_attention: implementation {implementation!r}: expected 'auto', 'triton', 'blocked' or 'reference'"
        )
    if implementation == "triton" and (query.dtype not in KERNEL_TYPES or width > 256):
        raise ValueError(
            f"entropy_attention: the Triton kernels take float32, bfloat16, float16 and heads up to 256 wide, "
            f"not {query.dtype} and {width}; use implementation='blocked'"
        )
