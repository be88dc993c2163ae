"""Launches the Triton kernels on PyTorch tensors.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.entropy_attention.blocked import temperature_gradient
from model.entropy_attention.layout import empty_in_layout
from model.entropy_attention.triton_backward import key_kernel, query_kernel
from model.entropy_attention.triton_configurations import Blocks, configuration
from model.entropy_attention.triton_forward import forward_kernel
from model.entropy_attention.triton_fused_backward import fused_kernel

LOG2_E = math.log2(math.e)


def forward(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, N, T, H], entropy [B, N, T] in nats (empty where not asked for), lse [B, N, T] as a power of two."""
    batch, heads, tokens, width = q_BNTH.shape
    output_BNTH = empty_in_layout(q_BNTH)
    lse_BNT = torch.empty(q_BNTH.shape[:3], dtype=torch.float32, device=q_BNTH.device)
    entropy_BNT = torch.empty_like(lse_BNT) if with_entropy else lse_BNT.new_empty(0)
    mode, factors = _factors(temperature, scale, q_BNTH, k_BKTH)
    blocks = configuration(q_BNTH.dtype, width, tokens, causal).forward
    forward_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
        _descriptor(q_BNTH, blocks.rows),
        _descriptor(k_BKTH, blocks.keys),
        _descriptor(v_BKTH, blocks.keys),
        _descriptor(output_BNTH, blocks.rows),
        lse_BNT,
        entropy_BNT,
        factors,
        scale * LOG2_E,
        heads,
        heads // k_BKTH.shape[1],
        tokens,
        CAUSAL=causal,
        ENTROPY=with_entropy,
        **_constants(q_BNTH, mode, blocks),
    )
    return output_BNTH, entropy_BNT, lse_BNT


def backward(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    lse_BNT: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and of the temperature (None without one)."""
    tensors = {
        "query": q_BNTH,
        "key": k_BKTH,
        "value": v_BKTH,
        "output": output_BNTH,
        "grad_output": grad_output_BNTH if _addressable(grad_output_BNTH) else grad_output_BNTH.contiguous(),
        "grad_query": empty_in_layout(q_BNTH),
        "grad_key": empty_in_layout(k_BKTH),
        "grad_value": empty_in_layout(v_BKTH),
    }
    mode, factors = _factors(temperature, scale, q_BNTH, k_BKTH)
    score_gradient_BNT = torch.empty_like(lse_BNT) if temperature is not None else None
    unread = lse_BNT  # stands in for pointers that the kernel's mode leaves alone
    arguments = {
        "lse": lse_BNT,
        "entropy": entropy_BNT,
        "grad_entropy": unread if grad_entropy_BNT is None else grad_entropy_BNT.contiguous(),
        "slope": unread if grad_entropy_BNT is None else torch.empty_like(lse_BNT),
        "offset": torch.empty_like(lse_BNT),
        "factors": factors,
        "score_gradient": unread if score_gradient_BNT is None else score_gradient_BNT,
        "scale_log2": scale * LOG2_E,
        "heads": q_BNTH.shape[1],
        "group": q_BNTH.shape[1] // k_BKTH.shape[1],
        "tokens": q_BNTH.shape[2],
        "ENTROPY": grad_entropy_BNT is not None,
    }
    _launch_backward(tensors, arguments, mode, causal)
    temperature_grad = temperature_gradient(score_gradient_BNT, temperature)
    return tensors["grad_query"], tensors["grad_key"], tensors["grad_value"], temperature_grad


def _launch_backward(tensors: dict[str, Tensor], arguments: dict[str, Any], mode: int, causal: bool) -> None:
    """The fused kernel where the configuration has one, else the two that own queries and keys."""
    q_BNTH, key_programs = tensors["query"], tensors["key"].shape[0] * tensors["key"].shape[1]
    batch, heads, tokens, width = q_BNTH.shape
    chosen = configuration(q_BNTH.dtype, width, tokens, causal)
    if chosen.fused is not None:
        blocks = chosen.fused
        single = tokens <= blocks.keys
        rows = 0 if single else triton.cdiv(tokens, blocks.keys) * blocks.keys
        scratch = torch.empty(batch * heads, rows, _padded(width), dtype=torch.float32, device=q_BNTH.device)
        fused_kernel[(key_programs,)](
            **_descriptors(tensors, blocks),
            **arguments,
            **_constants(q_BNTH, mode, blocks),
            scratch=scratch,
            KEY_MAJOR=blocks.key_major,
            SINGLE=single,
        )
        return
    blocks = chosen.query
    owned = {name: x for name, x in tensors.items() if name not in ("grad_key", "grad_value")}
    query_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
        **_descriptors(owned, blocks), **arguments, **_constants(q_BNTH, mode, blocks), CAUSAL=causal
    )
    blocks = chosen.key
    owned = {name: x for name, x in tensors.items() if name not in ("output", "grad_query")}
    arguments = {name: x for name, x in arguments.items() if name not in ("entropy", "grad_entropy", "score_gradient")}
    key_kernel[(triton.cdiv(tokens, blocks.keys) * key_programs,)](
        **_descriptors(owned, blocks),
        **arguments,
        **_constants(q_BNTH, mode, blocks),
        CAUSAL=causal,
        KEY_MAJOR=blocks.key_major,
    )


def _factors(temperature: Tensor | None, scale: float, q_BNTH: Tensor, k_BKTH: Tensor) -> tuple[int, Tensor | None]:
    """The kernels' temperature mode, and scale / (t ln 2) as a contiguous [N] or [N, T] for it."""
    if temperature is None:
        return 0, None
    factors = (scale * LOG2_E) / temperature.float()
    if factors.dim() == 1 and q_BNTH.shape[1] != k_BKTH.shape[1]:
        # heads that share a key have temperatures of their own, so the factor belongs to the row
        factors = factors[:, None].expand(-1, q_BNTH.shape[2])
    return factors.dim(), factors.contiguous()


def _addressable(x_BNTH: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x: it wants a contiguous last dimension and 16-byte alignment."""
    size = x_BNTH.element_size()
    aligned = x_BNTH.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x_BNTH.stride()[:3])
    return aligned and x_BNTH.stride(3) == 1 and 0 not in x_BNTH.stride()


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _descriptor(x_BNTH: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x_BNTH, list(x_BNTH.shape), list(x_BNTH.stride()), [1, 1, rows, _padded(x_BNTH.shape[3])])


def _descriptors(tensors: dict[str, Tensor], blocks: Blocks) -> dict[str, TensorDescriptor]:
    of_keys = ("key", "value", "grad_key", "grad_value")
    return {name: _descriptor(x, blocks.keys if name in of_keys else blocks.rows) for name, x in tensors.items()}


def _constants(q_BNTH: Tensor, mode: int, blocks: Blocks) -> dict[str, Any]:
    tokens, width = q_BNTH.shape[2:]
    return {
        "EVEN": tokens % max(blocks.rows, blocks.keys) == 0,
        "MODE": mode,
        "PRECISION": "ieee" if q_BNTH.dtype == torch.float32 else "tf32",
        "HP": _padded(width),
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }
