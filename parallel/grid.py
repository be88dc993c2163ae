"""The rank grid: `arange(world).reshape(pp, dp, cp, tp)`, written here and nowhere else.

Tensor-parallel neighbours are consecutive ranks, which share a node. Context-parallel ranks come next, then
data-parallel ranks, then pipeline stages. This is Megatron's order. Two grids of 8 ranks, with tp=2, pp=2, dp=2 and
with tp=2, cp=2, dp=2:

    rank                0 1 2 3 4 5 6 7        0 1 2 3 4 5 6 7
    pipeline stage      0 0 0 0 1 1 1 1        0 0 0 0 0 0 0 0
    data-parallel rank  0 0 1 1 0 0 1 1        0 0 0 0 1 1 1 1
    context rank        0 0 0 0 0 0 0 0        0 0 1 1 0 0 1 1
    tensor rank         0 1 0 1 0 1 0 1        0 1 0 1 0 1 0 1

Context-parallel ranks, like data-parallel ranks, hold the same weights and different tokens. The engine treats the two
axes as one: it averages gradients and shards optimizer state over the dp x cp replicas.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class RankGrid:
    """Sizes of the axes and this process's place in them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def ranks(self) -> np.ndarray:
        """Global ranks, [pp, dp, cp, tp]."""
        return np.arange(self.world_size).reshape(self.pp, self.dp, self.cp, self.tp)

    @functools.cached_property
    def coordinates(self) -> tuple[int, int, int, int]:
        """This rank's (stage, data-parallel rank, context-parallel rank, tensor-parallel rank)."""
        stage, dp_rank, cp_rank, tp_rank = np.unravel_index(self.rank, self.ranks.shape)
        return int(stage), int(dp_rank), int(cp_rank), int(tp_rank)

    @property
    def stage(self) -> int:
        return self.coordinates[0]

    @property
    def dp_rank(self) -> int:
        return self.coordinates[1]

    @property
    def cp_rank(self) -> int:
        return self.coordinates[2]

    @property
    def tp_rank(self) -> int:
        return self.coordinates[3]

    @property
    def replicas(self) -> int:
        """The number of ranks with the same weights and different tokens; gradients are averaged over them."""
        return self.dp * self.cp

    @property
    def replica(self) -> int:
        """This rank's index among its replicas."""
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    def heads(self, num_heads: int) -> range:
        """Return the heads whose attention this rank computes; tp and cp divide them."""
        held = num_heads // (self.tp * self.cp)
        first = (self.tp_rank * self.cp + self.cp_rank) * held
        return range(first, first + held)

    def positions(self, seq_length: int) -> range:
        """Return the positions of each sequence that this rank holds outside attention."""
        held = seq_length // self.cp
        return range(self.cp_rank * held, (self.cp_rank + 1) * held)

    def table(self, layers: Sequence[range]) -> str:
        """Return a table with a line for each rank: its coordinates and layers.

        Args:
            layers: of each stage, from `parallel.stages.stage_layers`.
        """
        lines = ["rank  stage  data  context  tensor  layers"]
        for rank in range(self.world_size):
            place = replace(self, rank=rank)
            held = layers[place.stage]
            lines.append(
                f"{rank:4d}  {place.stage:5d}  {place.dp_rank:4d}  {place.cp_rank:7d}  {place.tp_rank:6d}  "
                f"{held.start}-{held.stop - 1}"
            )
        return "\n".join(lines)
