"""Materialized attention with entropies in plain differentiable PyTorch: the reference for all other versions.

Tensor names carry their shape: B sequences, N query heads, K key heads, T tokens, H head width.
"""

import torch
from torch import Tensor


def attention(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    temperature: Tensor | None,
    document_start_BT: Tensor | None,
    *,
    scale: float,
    causal: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, N, T, H] and row entropies in nats [B, N, T], through the whole T x T matrix.

    Runs in the inputs' precision except that 16-bit inputs are computed in float32. H = -sum_j a_ij ln a_ij, as
    `entropy = lse - sum_j a_ij s_ij` taken relative to the row's maximum (arXiv 2501.03489, Algorithm 1).
    """
    dtype, compute = q_BNTH.dtype, torch.promote_types(q_BNTH.dtype, torch.float32)
    q_BNTH, k_BKTH, v_BKTH = q_BNTH.to(compute), k_BKTH.to(compute), v_BKTH.to(compute)
    group = q_BNTH.shape[1] // k_BKTH.shape[1]
    k_BNTH, v_BNTH = k_BKTH.repeat_interleave(group, dim=1), v_BKTH.repeat_interleave(group, dim=1)
    s_BNTT = (q_BNTH * scale) @ k_BNTH.transpose(-1, -2)
    if temperature is not None:
        s_BNTT = s_BNTT / temperature.to(compute).view(temperature.shape[0], -1, 1)
    tokens = q_BNTH.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BNTH.device)
    visible = visible.tril() if causal else visible
    if document_start_BT is not None:
        from_start_BTT = torch.arange(tokens, device=q_BNTH.device) >= document_start_BT.unsqueeze(-1)
        visible = visible & from_start_BTT.unsqueeze(1)
    a_BNTT = s_BNTT.masked_fill(~visible, float("-inf")).softmax(-1)
    output_BNTH = (a_BNTT @ v_BNTH).to(dtype)
    if not with_entropy:
        return output_BNTH, None
    log_a_BNTT = s_BNTT.masked_fill(~visible, float("-inf")).log_softmax(-1).masked_fill(~visible, 0.0)
    return output_BNTH, -(a_BNTT * log_a_BNTT).sum(-1)
