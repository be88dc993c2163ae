"""Computes how far a student's predictions are from a teacher's, in chunks, so that no logits exist for all tokens.

For a chunk of tokens with the student's and the teacher's logits z and u [C, V], and a temperature tau:

    p = softmax(u / tau)    q = softmax(z / tau)    loss = tau^2 sum_c sum_v p (ln p - ln q)    dz = tau (q - p)

The factor tau^2 keeps the gradient's size as tau grows (Hinton et al. 2015, arXiv 1503.02531). Like the cross-entropy
(model/cross_entropy.py), the forward pass computes both gradients while the chunk's logits exist.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cross_entropy import add_product, scaled, token_chunks


def linear_divergence(
    hidden_TBD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TBE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """Return tau^2 KL(teacher || student) in nats, summed over tokens; the teacher gets no gradient.

    Args:
        hidden_TBD: the student's, any leading shape, width D last.
        weight_VD: the student's head.
        teacher_hidden_TBE: the same leading shape, the teacher's width E last.
        teacher_weight_VE: the teacher's head; it may have another number of padding rows.
        vocab_size: rows of both heads that are tokens.
        temperature: tau, by which both logits are divided.

    Returns:
        A scalar in float32 or wider.
    """
    student, teacher = hidden_TBD.flatten(0, -2), teacher_hidden_TBE.flatten(0, -2)
    return _LinearDivergence.apply(student, weight_VD, teacher, teacher_weight_VE, vocab_size, temperature)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        vocab_size: int,
        temperature: float,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)
        loss = hidden.new_zeros((), dtype=exact)
        tokens_weight, teacher_tokens_weight = weight[:vocab_size], teacher_weight[:vocab_size]
        for rows in token_chunks(hidden.shape[0], weight):
            log_q = _log_probabilities(hidden[rows], tokens_weight, temperature, exact)
            log_p = _log_probabilities(teacher_hidden[rows], teacher_tokens_weight, temperature, exact)
            p = log_p.exp()
            loss += temperature**2 * (p * (log_p - log_q)).sum()
            grad_logits = log_q.exp_().sub_(p).mul_(temperature).to(weight.dtype)
            grad_hidden[rows] = grad_logits @ tokens_weight
            add_product(grad_weight[:vocab_size], grad_logits.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return scaled(grad_hidden, grads[0]), scaled(grad_weight, grads[0]), None, None, None, None


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float, exact: torch.dtype) -> Tensor:
    return (F.linear(hidden, weight).to(exact) / temperature).log_softmax(dim=1)


def relative_distance(states_TBD: list[Tensor], teacher_states_TBD: list[Tensor]) -> Tensor:
    """Return |s - t|^2 / |t|^2 of the residual after each layer, summed over tokens and averaged over layers.

    Args:
        states_TBD: the student's, of each layer.
        teacher_states_TBD: the teacher's, of as many layers and the same width.

    Returns:
        A scalar in float32 or wider.
    """
    total = torch.zeros((), device=states_TBD[0].device, dtype=torch.promote_types(states_TBD[0].dtype, torch.float32))
    for state, teacher in zip(states_TBD, teacher_states_TBD, strict=True):
        own, wanted = state.to(total.dtype), teacher.to(total.dtype)
        total = total + ((own - wanted).square().sum(-1) / wanted.square().sum(-1)).sum()
    return total / len(states_TBD)
