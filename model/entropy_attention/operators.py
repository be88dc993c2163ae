"""Attention with entropies as operators of PyTorch's library: one call to compilers, autocast and recomputation.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width,
S parts of a row's shift (see `attention_forward`).
"""

from typing import Any

import torch
from torch import Tensor

from model.entropy_attention import blocked
from model.entropy_attention.layout import empty_in_layout


def _kernels(implementation: str) -> Any:
    """The module with `forward` and `backward`; Triton is imported only where it is used."""
    if implementation == "blocked":
        return blocked
    from model.entropy_attention import triton_launch

    return triton_launch


@torch.library.custom_op("entropy_attention::forward", mutates_args=())
def attention_forward(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output in the query's layout, entropy [B, N, T] in nats (empty where not asked for), and what the backward needs.

    The last is [2, B, N, T]: each row's largest logit (Triton: its q . k) and the logarithm of the sum of exp(logit -
    largest), apart, for their sum would be rounded.
    """
    with torch.autocast(q_BNTH.device.type, enabled=False):
        return _kernels(implementation).forward(
            q_BNTH, k_BKTH, v_BKTH, temperature, document_start, scale, causal, with_entropy
        )


@attention_forward.register_fake
def _(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    shift_SBNT = q_BNTH.new_empty((2, *q_BNTH.shape[:3]), dtype=dtype)
    entropy_BNT = shift_SBNT.new_empty(q_BNTH.shape[:3] if with_entropy else 0)
    return empty_in_layout(q_BNTH), entropy_BNT, shift_SBNT


@torch.library.custom_op("entropy_attention::backward", mutates_args=())
def attention_backward(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    shift_SBNT: Tensor,
    scale: float,
    causal: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's layout, and of the temperature (empty without one)."""
    with torch.autocast(q_BNTH.device.type, enabled=False):
        dq_BNTH, dk_BKTH, dv_BKTH, dt = _kernels(implementation).backward(
            grad_output_BNTH,
            grad_entropy_BNT,
            q_BNTH,
            k_BKTH,
            v_BKTH,
            temperature,
            document_start,
            output_BNTH,
            entropy_BNT,
            shift_SBNT,
            scale,
            causal,
        )
    return dq_BNTH, dk_BKTH, dv_BKTH, shift_SBNT.new_empty(0) if dt is None else dt


@attention_backward.register_fake
def _(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    shift_SBNT: Tensor,
    scale: float,
    causal: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dt = shift_SBNT.new_empty(0) if temperature is None else torch.empty_like(temperature).contiguous()
    return empty_in_layout(q_BNTH), empty_in_layout(k_BKTH), empty_in_layout(v_BKTH), dt


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.with_entropy, ctx.implementation = inputs
    output_BNTH, entropy_BNT, shift_SBNT = output
    ctx.save_for_backward(*tensors, output_BNTH, entropy_BNT, shift_SBNT)
    ctx.mark_non_differentiable(shift_SBNT)
    ctx.set_materialize_grads(False)  # an entropy that no loss uses costs its backward nothing


def _backward(ctx: Any, grad_output: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q_BNTH, k_BKTH, v_BKTH, temperature, document_start, output_BNTH, entropy_BNT, shift_SBNT = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output_BNTH)
    if not ctx.with_entropy:
        grad_entropy = None
    dq_BNTH, dk_BKTH, dv_BKTH, dt = attention_backward(
        grad_output,
        grad_entropy,
        q_BNTH,
        k_BKTH,
        v_BKTH,
        temperature,
        document_start,
        output_BNTH,
        entropy_BNT,
        shift_SBNT,
        ctx.scale,
        ctx.causal,
        ctx.implementation,
    )
    return dq_BNTH, dk_BKTH, dv_BKTH, None if temperature is None else dt, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
