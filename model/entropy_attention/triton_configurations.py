"""Block sizes, warps and pipeline stages of every kernel, by type, head width and sequence length.

A fixed table and no autotuning at run time: the same call always runs the same code. Chosen by measuring on an H200,
for heads wider than 128 by the compiler's report: no spilled registers, no serialized products.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """`rows` queries by `keys` keys a tile. `registers` caps a thread's, so that more programs share a processor."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    in_registers: bool = True


@dataclass(frozen=True)
class Configuration:
    """Blocks of the three kernels."""

    forward: Blocks
    query: Blocks
    key: Blocks


def configuration(dtype: torch.dtype, width: int, tokens: int) -> Configuration:
    """The table; `width` is the head width."""
    if dtype == torch.float32:
        size = 32 if width <= 128 else 16
        blocks = Blocks(size, size, 8, 1)
        return Configuration(blocks, blocks, blocks)
    if width > 128:
        return Configuration(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1))
    if width > 64:
        return Configuration(Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2))
    return Configuration(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3, 168))
