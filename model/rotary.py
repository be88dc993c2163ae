"""Rotary position embedding (Su et al. 2021), in the half-split form of GPT-NeoX."""

import torch
from torch import Tensor


def rotate(x_TBNH: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotates feature pairs (h, h + H/2) of position t by the angle t * base^(-2h/H): [T, B, N, H] -> the same
    shape.
    """
    tokens, half = x_TBNH.shape[0], x_TBNH.shape[-1] // 2
    exact = torch.promote_types(x_TBNH.dtype, torch.float32)
    frequencies = base ** (-torch.arange(half, device=x_TBNH.device, dtype=exact) / half)
    angles = torch.outer(torch.arange(tokens, device=x_TBNH.device, dtype=exact), frequencies)[:, None, None]
    low, high = x_TBNH.to(exact).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_TBNH.dtype)
