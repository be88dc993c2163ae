"""Launches the Triton kernels on PyTorch tensors.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from model.entropy_attention.blocked import temperature_gradient
from model.entropy_attention.layout import empty_in_layout
from model.entropy_attention.triton_backward import key_kernel, query_kernel
from model.entropy_attention.triton_configurations import Blocks, configuration
from model.entropy_attention.triton_forward import forward_kernel
from model.entropy_attention.triton_fused_backward import fused_kernel


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
    batch, heads, tokens, _ = q_BNTH.shape
    output_BNTH = empty_in_layout(q_BNTH)
    lse_BNT = torch.empty(q_BNTH.shape[:3], dtype=torch.float32, device=q_BNTH.device)
    entropy_BNT = torch.empty_like(lse_BNT) if with_entropy else lse_BNT.new_empty(0)
    mode, temperature = _temperature(temperature, q_BNTH, k_BKTH)
    blocks = _configuration(q_BNTH, causal).forward
    forward_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
        q_BNTH,
        k_BKTH,
        v_BKTH,
        output_BNTH,
        lse_BNT,
        entropy_BNT,
        temperature,
        *_strides(q_BNTH, k_BKTH, v_BKTH, output_BNTH),
        scale * math.log2(math.e),
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
    batch, heads, tokens, width = q_BNTH.shape
    group = heads // k_BKTH.shape[1]
    if grad_output_BNTH.stride(-1) != 1:
        grad_output_BNTH = grad_output_BNTH.contiguous()
    dq_BNTH, dk_BKTH, dv_BKTH = empty_in_layout(q_BNTH), empty_in_layout(k_BKTH), empty_in_layout(v_BKTH)
    mode, kernel_temperature = _temperature(temperature, q_BNTH, k_BKTH)
    score_gradient_BNT = torch.empty_like(lse_BNT) if temperature is not None else None
    rows = {
        "lse_ptr": lse_BNT,
        "slope_ptr": torch.empty_like(lse_BNT),
        "offset_ptr": torch.empty_like(lse_BNT),
        "temperature": kernel_temperature,
    }
    query_rows = {
        "entropy_ptr": entropy_BNT,
        "grad_entropy_ptr": grad_entropy_BNT.contiguous() if grad_entropy_BNT is not None else lse_BNT,
        "score_gradient_ptr": score_gradient_BNT if score_gradient_BNT is not None else lse_BNT,
    }
    sizes = {"scale_log2": scale * math.log2(math.e), "heads": heads, "group": group, "tokens": tokens}
    inputs = {"q": q_BNTH, "k": k_BKTH, "v": v_BKTH, "do": grad_output_BNTH}
    chosen, entropy = _configuration(q_BNTH, causal), grad_entropy_BNT is not None
    if chosen.fused is not None:
        blocks = chosen.fused
        padded = triton.next_power_of_2(width)
        single = tokens <= blocks.keys
        scratch = torch.empty(0 if single else lse_BNT.numel() * padded, dtype=torch.float32, device=q_BNTH.device)
        tensors = inputs | {"o": output_BNTH, "dq": dq_BNTH, "dk": dk_BKTH, "dv": dv_BKTH}
        fused_kernel[(batch * heads // group,)](
            **_named(tensors),
            **rows,
            **query_rows,
            **sizes,
            scratch_ptr=scratch,
            ENTROPY=entropy,
            KEY_MAJOR=blocks.key_major,
            SINGLE=single,
            **_constants(q_BNTH, mode, blocks),
        )
    else:
        blocks = chosen.query
        query_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
            **_named(inputs | {"o": output_BNTH, "dq": dq_BNTH}),
            **rows,
            **query_rows,
            **sizes,
            CAUSAL=causal,
            ENTROPY=entropy,
            **_constants(q_BNTH, mode, blocks),
        )
        blocks = chosen.key
        key_kernel[(triton.cdiv(tokens, blocks.keys) * batch * heads // group,)](
            **_named(inputs | {"dk": dk_BKTH, "dv": dv_BKTH}),
            **rows,
            **sizes,
            CAUSAL=causal,
            ENTROPY=entropy,
            KEY_MAJOR=blocks.key_major,
            **_constants(q_BNTH, mode, blocks),
        )
    return dq_BNTH, dk_BKTH, dv_BKTH, temperature_gradient(score_gradient_BNT, temperature)


def _configuration(q_BNTH: Tensor, causal: bool) -> Any:
    return configuration(q_BNTH.dtype, triton.next_power_of_2(q_BNTH.shape[3]), q_BNTH.shape[2], causal)


def _temperature(temperature: Tensor | None, q_BNTH: Tensor, k_BKTH: Tensor) -> tuple[int, Tensor]:
    """The kernels' temperature mode and a contiguous float32 tensor (any tensor in mode 0)."""
    if temperature is None:
        return 0, q_BNTH
    temperature = temperature.detach().float()
    if temperature.dim() == 1 and q_BNTH.shape[1] != k_BKTH.shape[1]:
        # heads that share a key have temperatures of their own, so the factor belongs to the row
        temperature = temperature[:, None].expand(-1, q_BNTH.shape[2])
    return temperature.dim(), temperature.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _named(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Pointers and strides under the kernels' argument names."""
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        arguments |= {f"stride_{name}{dim}": stride for dim, stride in zip("bnt", tensor.stride()[:3], strict=True)}
    return arguments


def _constants(q_BNTH: Tensor, mode: int, blocks: Blocks) -> dict[str, Any]:
    tokens, width = q_BNTH.shape[2:]
    return {
        "EVEN": tokens % max(blocks.rows, blocks.keys) == 0,
        "MODE": mode,
        "PRECISION": "ieee" if q_BNTH.dtype == torch.float32 else "tf32",
        "H": width,
        "HP": max(16, triton.next_power_of_2(width)),
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
