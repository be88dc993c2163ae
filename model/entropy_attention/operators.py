"""Attention with entropies as operators of PyTorch's library: one call to compilers, autocast and recomputation.

Both take `projections`: query [B, N, T, H], key and value [B, K, T, H], or one joint tensor [T, B, N, 3, H] of all
three. A joint one has a joint gradient, which the kernels write in place; three would have to be gathered into it.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width,
S parts of a row's shift (see `attention_forward`).
"""

from collections.abc import Sequence
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


def separate(projections: Sequence[Tensor]) -> Sequence[Tensor]:
    """Query, key and value [B, heads, T, H], as views."""
    if len(projections) == 3:
        return projections
    return [x_TBNH.permute(1, 2, 0, 3) for x_TBNH in projections[0].unbind(3)]


@torch.library.custom_op("entropy_attention::forward", mutates_args=())
def attention_forward(
    projections: Sequence[Tensor],
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
    with torch.autocast(projections[0].device.type, enabled=False):
        return _kernels(implementation).forward(
            *separate(projections), temperature, document_start, scale, causal, with_entropy
        )


@attention_forward.register_fake
def _(
    projections: Sequence[Tensor],
    temperature: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q_BNTH = separate(projections)[0]
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    shift_SBNT = q_BNTH.new_empty((2, *q_BNTH.shape[:3]), dtype=dtype)
    entropy_BNT = shift_SBNT.new_empty(q_BNTH.shape[:3] if with_entropy else 0)
    return empty_in_layout(q_BNTH), entropy_BNT, shift_SBNT


@torch.library.custom_op("entropy_attention::backward", mutates_args=())
def attention_backward(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    projections: Sequence[Tensor],
    temperature: Tensor | None,
    document_start: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    shift_SBNT: Tensor,
    scale: float,
    causal: bool,
    implementation: str,
) -> list[Tensor]:
    """Gradients of the projections, each in its tensor's layout, and of the temperature (empty without one)."""
    gradients = [empty_in_layout(x) for x in projections]
    with torch.autocast(output_BNTH.device.type, enabled=False):
        dt = _kernels(implementation).backward(
            grad_output_BNTH,
            grad_entropy_BNT,
            *separate(projections),
            temperature,
            document_start,
            output_BNTH,
            entropy_BNT,
            shift_SBNT,
            scale,
            causal,
            *separate(gradients),
        )
    return [*gradients, shift_SBNT.new_empty(0) if dt is None else dt]


@attention_backward.register_fake
def _(
    grad_output_BNTH: Tensor,
    grad_entropy_BNT: Tensor | None,
    projections: Sequence[Tensor],
    temperature: Tensor | None,
    document_start: Tensor | None,
    output_BNTH: Tensor,
    entropy_BNT: Tensor,
    shift_SBNT: Tensor,
    scale: float,
    causal: bool,
    implementation: str,
) -> list[Tensor]:
    dt = shift_SBNT.new_empty(0) if temperature is None else torch.empty_like(temperature).contiguous()
    return [*(empty_in_layout(x) for x in projections), dt]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    projections, temperature, document_start, ctx.scale, ctx.causal, ctx.with_entropy, ctx.implementation = inputs
    ctx.save_for_backward(*projections, temperature, document_start, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # an entropy that no loss uses costs its backward nothing


def _backward(ctx: Any, grad_output: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Any, ...]:
    *projections, temperature, document_start, output_BNTH, entropy_BNT, shift_SBNT = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output_BNTH)
    if not ctx.with_entropy:
        grad_entropy = None
    *gradients, dt = attention_backward(
        grad_output,
        grad_entropy,
        projections,
        temperature,
        document_start,
        output_BNTH,
        entropy_BNT,
        shift_SBNT,
        ctx.scale,
        ctx.causal,
        ctx.implementation,
    )
    return gradients, None if temperature is None else dt, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
