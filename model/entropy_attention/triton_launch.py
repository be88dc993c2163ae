"""Launches the Triton kernels on PyTorch tensors.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width,
S parts of a row's shift.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.entropy_attention.layout import empty_in_layout
from model.entropy_attention.triton_backward import key_kernel, query_kernel
from model.entropy_attention.triton_configurations import Blocks, configuration
from model.entropy_attention.triton_forward import forward_kernel

LOG2_E = math.log2(math.e)


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
    """Output [B, N, T, H], entropy [B, N, T] in nats (empty where not asked for), each row's shift [2, B, N, T].

    The shift is the q . k of the row's largest logit, and log2 of the sum of exp2(logit - largest).
    """
    batch, heads, tokens, width = q_BNTH.shape
    q_BNTH, k_BKTH, v_BKTH = (_addressable(x) for x in (q_BNTH, k_BKTH, v_BKTH))
    output_BNTH = empty_in_layout(q_BNTH)
    shift_SBNT = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=q_BNTH.device)
    entropy_BNT = shift_SBNT.new_empty((batch, heads, tokens) if with_entropy else 0)
    mode, kernel_temperature = _temperature(temperature, q_BNTH, k_BKTH)
    blocks = configuration(q_BNTH.dtype, width, tokens).forward
    forward_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
        _descriptor(q_BNTH, blocks.rows),
        _descriptor(k_BKTH, blocks.keys),
        _descriptor(v_BKTH, blocks.keys),
        _descriptor(output_BNTH, blocks.rows),
        shift_SBNT[0],
        shift_SBNT[1],
        entropy_BNT,
        kernel_temperature,
        _document_start(document_start_BT),
        scale * LOG2_E,
        heads,
        heads // k_BKTH.shape[1],
        tokens,
        CAUSAL=causal,
        DOCUMENTS=document_start_BT is not None,
        ENTROPY=with_entropy,
        IN_REGISTERS=blocks.in_registers,
        **_constants(q_BNTH, mode, blocks),
    )
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
    """Fills the gradients of query, key and value, and returns that of the temperature (None without one)."""
    tensors = {
        "query": _addressable(q_BNTH),
        "key": _addressable(k_BKTH),
        "value": _addressable(v_BKTH),
        "output": output_BNTH,
        "grad_output": _addressable(grad_output_BNTH),
        "grad_query": dq_BNTH,
        "grad_key": dk_BKTH,
        "grad_value": dv_BKTH,
    }
    mode, kernel_temperature = _temperature(temperature, q_BNTH, k_BKTH)
    unread = shift_SBNT[0]  # stands in for pointers that the kernel's mode leaves alone
    grad_temperature_BNT = torch.empty_like(unread) if temperature is not None else None
    arguments = {
        "peak": shift_SBNT[0],
        "log_sum": shift_SBNT[1],
        "entropy": entropy_BNT,
        "grad_entropy": unread if grad_entropy_BNT is None else grad_entropy_BNT.contiguous(),
        "slope": unread if grad_entropy_BNT is None else torch.empty_like(unread),
        "offset": torch.empty_like(unread),
        "temperature": kernel_temperature,
        "document_start": _document_start(document_start_BT),
        "row_grad_temperature": unread if grad_temperature_BNT is None else grad_temperature_BNT,
        "scale_log2": scale * LOG2_E,
        "heads": q_BNTH.shape[1],
        "group": q_BNTH.shape[1] // k_BKTH.shape[1],
        "tokens": q_BNTH.shape[2],
        "CAUSAL": causal,
        "DOCUMENTS": document_start_BT is not None,
        "ENTROPY": grad_entropy_BNT is not None,
        "EXACT": q_BNTH.dtype == torch.float32,
    }
    _launch_backward(tensors, arguments, mode)
    if temperature is None or grad_temperature_BNT is None:
        return None
    return grad_temperature_BNT.sum((0, 2) if temperature.dim() == 1 else 0).to(temperature.dtype)


def _launch_backward(tensors: dict[str, Tensor], arguments: dict[str, Any], mode: int) -> None:
    """First the kernel that owns queries, which leaves the row constants to the one that owns keys."""
    batch, heads, tokens, width = tensors["query"].shape
    chosen = configuration(tensors["query"].dtype, width, tokens)
    blocks = chosen.query
    owned = {name: x for name, x in tensors.items() if name not in ("grad_key", "grad_value")}
    query_kernel[(triton.cdiv(tokens, blocks.rows) * batch * heads,)](
        **_descriptors(owned, blocks),
        **arguments,
        **_constants(tensors["query"], mode, blocks),
    )
    blocks = chosen.key
    owned = {name: x for name, x in tensors.items() if name not in ("output", "grad_query")}
    not_read = ("entropy", "grad_entropy", "row_grad_temperature")
    arguments = {name: x for name, x in arguments.items() if name not in not_read}
    arguments["document_stop"] = _document_stop(arguments["document_start"], blocks.keys)
    key_kernel[(triton.cdiv(tokens, blocks.keys) * batch * tensors["key"].shape[1],)](
        **_descriptors(owned, blocks), **arguments, **_constants(tensors["query"], mode, blocks)
    )


def _temperature(temperature: Tensor | None, q_BNTH: Tensor, k_BKTH: Tensor) -> tuple[int, Tensor | None]:
    """The kernels' temperature mode, and a contiguous float32 [N] or [N, T] for it."""
    if temperature is None:
        return 0, None
    temperature = temperature.float()
    if temperature.dim() == 1 and q_BNTH.shape[1] != k_BKTH.shape[1]:
        # heads that share a key have temperatures of their own, so the factor belongs to the row
        temperature = temperature[:, None].expand(-1, q_BNTH.shape[2])
    return temperature.dim(), temperature.contiguous()


def _document_start(document_start_BT: Tensor | None) -> Tensor | None:
    return None if document_start_BT is None else document_start_BT.int().contiguous()


def _document_stop(document_start_BT: Tensor | None, keys: int) -> Tensor | None:
    """[B, blocks of keys]: how many rows come before the first whose document begins after the block."""
    if document_start_BT is None:
        return None
    sequences, tokens = document_start_BT.shape
    block_stops = torch.arange(keys, tokens + keys, keys, dtype=torch.int32, device=document_start_BT.device)
    return torch.searchsorted(document_start_BT, block_stops.expand(sequences, -1).contiguous(), out_int32=True)


def _addressable(x_BNTH: Tensor) -> Tensor:
    """x itself, or a copy if its strides or address are no multiples of 16 bytes, which a tensor descriptor wants."""
    step = 16 // x_BNTH.element_size()
    batch, head, token, last = x_BNTH.stride()
    if last == 1 and all(s % step == 0 and s > 0 for s in (batch, head, token)) and x_BNTH.data_ptr() % 16 == 0:
        return x_BNTH
    return torch.empty_like(x_BNTH, memory_format=torch.contiguous_format).copy_(x_BNTH)


def _padded(width: int) -> int:
    """The next power of two, at least 16; Triton's own function for it costs the host as much as all else here."""
    return max(16, 1 << (width - 1).bit_length())


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
        "HP": _padded(width),
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }
