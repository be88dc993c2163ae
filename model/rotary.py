"""Rotary position embedding (Su et al. 2021), in the half-split form of GPT-NeoX."""

import torch
from torch import Tensor


def rotate(x_TBNH: Tensor, position_TB: Tensor | None = None, base: float = 10_000.0) -> Tensor:
    """Rotate feature pairs (h, h + H/2) of position t by the angle t * base^(-2h/H).

    Args:
        x_TBNH: queries or keys.
        position_TB: t of each token, [T, B] or [T, 1]; 0, 1, 2 ... by default.

    Returns:
        The same shape and type.
    """
    half, exact = x_TBNH.shape[-1] // 2, torch.promote_types(x_TBNH.dtype, torch.float32)
    if position_TB is None:
        position_TB = torch.arange(x_TBNH.shape[0], device=x_TBNH.device).unsqueeze(1)
    frequencies = base ** (-torch.arange(half, device=x_TBNH.device, dtype=exact) / half)
    angles = position_TB.to(exact)[..., None, None] * frequencies
    low, high = x_TBNH.to(exact).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_TBNH.dtype)
