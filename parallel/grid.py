"""The rank grid, written once: `arange(world).reshape(pp, dp, tp)`.

Tensor-parallel neighbours are consecutive ranks (one node), then data parallel, then pipeline stages: Megatron's order,
which DeepSpeed's (pipe, data, model) topology shares. For 8 ranks with tp=2, pp=2, dp=2:

    rank                0 1 2 3 4 5 6 7
    pipeline stage      0 0 0 0 1 1 1 1
    data-parallel rank  0 0 1 1 0 0 1 1
    tensor rank         0 1 0 1 0 1 0 1
"""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankGrid:
    """Sizes of the axes and this process's place in them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def ranks(self) -> np.ndarray:
        """Global ranks, [pp, dp, tp]."""
        return np.arange(self.world_size).reshape(self.pp, self.dp, self.tp)

    @property
    def coordinates(self) -> tuple[int, int, int]:
        """This rank's (stage, data-parallel rank, tensor-parallel rank)."""
        stage, replica, shard = np.unravel_index(self.rank, (self.pp, self.dp, self.tp))
        return int(stage), int(replica), int(shard)

    @property
    def stage(self) -> int:
        return self.coordinates[0]

    @property
    def dp_rank(self) -> int:
        return self.coordinates[1]

    @property
    def tp_rank(self) -> int:
        return self.coordinates[2]

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this rank's stage; the first stages take one more where pp does not divide."""
        return stage_layers(num_layers, self.pp)[self.stage]

    def table(self, num_layers: int) -> str:
        """A line for each rank: its coordinates and layers."""
        lines = ["rank  stage  data  tensor  layers"]
        for rank in range(self.world_size):
            place = RankGrid(self.tp, self.pp, self.dp, rank)
            held = place.layers(num_layers)
            lines.append(
                f"{rank:4d}  {place.stage:5d}  {place.dp_rank:4d}  {place.tp_rank:6d}  {held.start}-{held.stop - 1}"
            )
        return "\n".join(lines)


def stage_layers(num_layers: int, pp: int) -> list[range]:
    """Contiguous layer ranges of the stages, sizes differing by at most one: 7 layers on 3 stages give 3, 2, 2."""
    assert 1 <= pp <= num_layers, (pp, num_layers)
    bounds = np.cumsum([0] + [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)])
    return [range(int(start), int(stop)) for start, stop in itertools.pairwise(bounds)]
