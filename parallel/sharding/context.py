"""Context parallelism as in DeepSpeed-Ulysses (Jacobs et al. 2023), applied from outside to a model for one process.

Each of the cp ranks holds T / cp positions of every sequence. Attention needs all T, so queries, keys and values are
exchanged before it: each rank gets all positions of 1 / cp of the heads. The output is exchanged back.

    [T / cp, B, N, H] -all-to-all-> [T, B, N / cp, H] -attention-> [T, B, N / cp, H] -all-to-all-> [T / cp, B, N, H]

With tensor parallelism as well, each tensor-parallel rank exchanges its own heads, around attention. Without it, the
exchanges hide behind the products with W_qkv and W_o (`parallel.sharding.products`).

A head's temperatures are applied on the rank that computes its attention. Its entropies stay there and meet its
threshold (see parallel.sharding.regularizer). On each rank every parameter sees part of the tokens or of the heads, so
its gradient is a part of a sum, as over data-parallel ranks. The engine averages over both axes together.
"""

from functools import partial

from torch import Tensor, nn

from model.transformer import Attention, CoreAttention, Transformer
from parallel.sharding.collectives import name_of
from parallel.sharding.exchange import heads_for_positions, positions_for_heads
from parallel.sharding.megatron import Groups
from parallel.sharding.products import heads_linear, positions_linear


def apply_context_parallel(model: Transformer, groups: Groups) -> None:
    """Exchange heads for positions around attention, and set the first position that the embedding holds."""
    grid = groups.grid
    if grid.cp == 1:
        return
    if model.embedding is not None:
        model.embedding.first_position = grid.positions(model.config.seq_length).start
    for block in model.layers.values():
        if grid.tp > 1:
            block.attention.core = ContextParallelCore(block.attention.core, groups)
        else:
            _exchange_within_products(block.attention, groups)


def _exchange_within_products(attention: Attention, groups: Groups) -> None:
    group = name_of(groups.context)
    held = attention.query_bias.shape[0] // groups.grid.cp
    attention.heads = slice(groups.grid.cp_rank * held, (groups.grid.cp_rank + 1) * held)
    attention.query_key_value.product = partial(heads_linear, group=group)
    attention.output.product = partial(_output, group=group)


def _output(x: Tensor, weight: Tensor, bias: None, group: str) -> Tensor:
    y, _ = positions_linear(x, weight, group)
    return y


class ContextParallelCore(nn.Module):
    """Attention over all positions for this rank's share of the heads."""

    def __init__(self, core: CoreAttention, groups: Groups) -> None:
        super().__init__()
        self.core, self.group = core, name_of(groups.context)
        self.ranks, self.rank = groups.grid.cp, groups.grid.cp_rank

    def forward(
        self, qkv_TBN3H: Tensor, temperature: Tensor | None, document_start_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run attention on this rank's positions and the heads of all cp ranks.

        Args:
            qkv_TBN3H: query, key and value of each head, [T / cp, B, N, 3, H].
            temperature: [N] or [N, T], or None.
            document_start_BT: [B, T] over the whole sequence, or None.

        Returns:
            The output [T / cp, B, N, H], and the entropy in nats of this rank's heads, [B, N / cp, T].
        """
        width = qkv_TBN3H.shape[-1]
        qkv_TBN3H = heads_for_positions(qkv_TBN3H.flatten(3), self.group, self.ranks).unflatten(3, (3, width))
        if temperature is not None:
            temperature = temperature.chunk(self.ranks)[self.rank]
        out_TBNH, entropy_BNT = self.core(qkv_TBN3H, temperature, document_start_BT)
        return positions_for_heads(out_TBNH, self.group, self.ranks), entropy_BNT
