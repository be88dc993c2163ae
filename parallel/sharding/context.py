"""Context parallelism in the manner of Ulysses (Jacobs et al. 2023), applied from outside to a model built for one
process.

Each of the cp ranks holds T / cp positions of every sequence, except inside attention: there queries, keys and values
are exchanged so that each rank has all T positions of 1 / cp of the heads, and the output is exchanged back.

    [T / cp, B, N, H] -all-to-all-> [T, B, N / cp, H] -attention-> [T, B, N / cp, H] -all-to-all-> [T / cp, B, N, H]

What belongs to a head follows it: its temperatures are taken where its attention is computed, and entropies stay there,
with the head's threshold (see parallel.sharding.regularizer). Every parameter sees a part of the tokens or of the heads
on each rank, so its gradient is a part of a sum, exactly as over data-parallel ranks; the engine averages over both
alike.
"""

from torch import Tensor, nn

from model.transformer import CoreAttention, Transformer
from parallel.sharding.collectives import name_of
from parallel.sharding.exchange import heads_for_positions, positions_for_heads
from parallel.sharding.megatron import Groups


def apply_context_parallel(model: Transformer, groups: Groups) -> None:
    """Replaces what attention does between its projections, and tells the embedding which positions it has."""
    grid = groups.grid
    if grid.cp == 1:
        return
    if model.embedding is not None:
        model.embedding.first_position = grid.positions(model.config.seq_length).start
    for block in model.layers.values():
        block.attention.core = ContextParallelCore(block.attention.core, groups)


class ContextParallelCore(nn.Module):
    """Attention over all positions for this rank's share of the heads."""

    def __init__(self, core: CoreAttention, groups: Groups) -> None:
        super().__init__()
        self.core, self.group = core, name_of(groups.context)
        self.ranks, self.rank = groups.grid.cp, groups.grid.cp_rank

    def forward(
        self, qkv_TBN3H: Tensor, temperature: Tensor | None, document_start_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions of this rank, heads of all cp ranks -> output likewise; entropy [B, N / cp, T] of its own heads."""
        width = qkv_TBN3H.shape[-1]
        qkv_TBN3H = heads_for_positions(qkv_TBN3H.flatten(3), self.group, self.ranks).unflatten(3, (3, width))
        if temperature is not None:
            temperature = temperature.chunk(self.ranks)[self.rank]
        out_TBNH, entropy_BNT = self.core(qkv_TBN3H, temperature, document_start_BT)
        return positions_for_heads(out_TBNH, self.group, self.ranks), entropy_BNT
