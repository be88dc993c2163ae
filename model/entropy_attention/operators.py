"""Attention with entropies for autograd: as operators of PyTorch's library, and as plain calls in eager mode.

Compilers and dispatch modes (fake tensors, selective recomputation) see each operator as one call. In eager mode
`attention` bypasses the library, whose overhead on the host exceeds the GPU's time for a short sequence.

Both take `projections`: query [B, N, T, H], key and value [B, K, T, H], or one joint tensor [T, B, N, 3, H]. A joint
tensor has a joint gradient, which the kernels write in place. Three separate gradients would have to be copied into it.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width,
S parts of a row's shift (see `attention_forward`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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


def attention(
    projections: Sequence[Tensor],
    temperature: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    causal: bool,
    with_entropy: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Output and entropy as `attention_forward` gives them, differentiable."""
    options = (temperature, document_start, scale, causal, with_entropy, implementation)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return attention_forward(projections, *options)[:2]
    return _Attention.apply(*options, *projections)[:2]


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
    """Return the output in the query's layout, the entropy [B, N, T] in nats, and what the backward pass needs.

    The entropy is empty if it is not asked for. The last result is [2, B, N, T]: each row's largest logit (Triton: its
    q . k), and the logarithm of the sum of exp(logit - largest). They stay separate because their sum would be rounded.
    """
    return _forward(projections, temperature, document_start, scale, causal, with_entropy, implementation)


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
    return _gradients(
        grad_output_BNTH,
        grad_entropy_BNT,
        projections,
        temperature,
        document_start,
        output_BNTH,
        entropy_BNT,
        shift_SBNT,
        scale,
        causal,
        implementation,
    )


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


def _forward(projections: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(projections[0].device.type, enabled=False):
        return _kernels(options[-1]).forward(*separate(projections), *options[:-1])


def _gradients(
    grad_output: Tensor, grad_entropy: Tensor | None, projections: Sequence[Tensor], *others: Any
) -> list[Tensor]:
    gradients = [empty_in_layout(x) for x in projections]
    with torch.autocast(grad_output.device.type, enabled=False):
        dt = _kernels(others[-1]).backward(
            grad_output, grad_entropy, *separate(projections), *others[:-1], *separate(gradients)
        )
    return [*gradients, grad_output.new_empty(0) if dt is None else dt]


def _save(ctx: Any, projections: Sequence[Tensor], options: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    temperature, document_start, ctx.scale, ctx.causal, ctx.with_entropy, ctx.implementation = options
    ctx.save_for_backward(*projections, temperature, document_start, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # an entropy that no loss uses costs its backward nothing


def _backward(
    ctx: Any, gradients: Callable[..., list[Tensor]], grad_output: Tensor | None, grad_entropy: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the projections and of the temperature."""
    *projections, temperature, document_start, output_BNTH, entropy_BNT, shift_SBNT = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output_BNTH)
    *of_projections, dt = gradients(
        grad_output,
        grad_entropy if ctx.with_entropy else None,
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
    return of_projections, None if temperature is None else dt


def _save_for_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, inputs[0], inputs[1:], output)


def _backward_of_operator(ctx: Any, grad_output: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Any, ...]:
    of_projections, dt = _backward(ctx, attention_backward, grad_output, grad_entropy)
    return of_projections, dt, None, None, None, None, None


attention_forward.register_autograd(_backward_of_operator, setup_context=_save_for_operator)


class _Attention(torch.autograd.Function):
    """The same autograd function without PyTorch's operator library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        options, projections = inputs[:OPTIONS], inputs[OPTIONS:]
        output = _forward(projections, *options)
        _save(ctx, projections, options, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of_projections, dt = _backward(ctx, _gradients, grads[0], grads[1])
        return dt, None, None, None, None, None, *of_projections


OPTIONS = 6  # temperature, document_start, scale, causal, with_entropy, implementation
