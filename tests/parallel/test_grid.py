"""Test the rank grid."""

import dataclasses
import itertools

import numpy as np
import pytest

from parallel import grid as grid_module
from parallel.config import padded_vocab_size
from parallel.grid import RankGrid

EIGHT_RANKS = """\
rank  stage  data  context  tensor  layers
   0      0     0        0       0  0-3
   1      0     0        0       1  0-3
   2      0     1        0       0  0-3
   3      0     1        0       1  0-3
   4      1     0        0       0  4-6
   5      1     0        0       1  4-6
   6      1     1        0       0  4-6
   7      1     1        0       1  4-6"""


def test_table_of_eight_ranks() -> None:
    table = RankGrid(tp=2, pp=2, dp=2).table([range(4), range(4, 7)])
    print(table)
    assert table == EIGHT_RANKS


def test_the_documented_tables_are_the_real_ones() -> None:
    rows = {}
    for line in (grid_module.__doc__ or "").splitlines():
        words = line.split()
        if len(words) > 16 and all(word.isdigit() for word in words[-16:]):
            rows[" ".join(words[:-16])] = [int(word) for word in words[-16:]]
    places = [RankGrid(tp=2, pp=2, dp=2, rank=rank) for rank in range(8)]
    places += [RankGrid(tp=2, cp=2, dp=2, rank=rank) for rank in range(8)]
    assert rows == {
        "rank": list(range(8)) * 2,
        "pipeline stage": [place.stage for place in places],
        "data-parallel rank": [place.dp_rank for place in places],
        "context rank": [place.cp_rank for place in places],
        "tensor rank": [place.tp_rank for place in places],
    }


@pytest.mark.parametrize(("tp", "pp", "dp", "cp"), list(itertools.product((1, 2, 3), repeat=4)))
def test_coordinates_find_the_rank_again(tp: int, pp: int, dp: int, cp: int) -> None:
    grid = RankGrid(tp=tp, pp=pp, dp=dp, cp=cp)
    assert grid.ranks.shape == (pp, dp, cp, tp)
    assert sorted(grid.ranks.flatten()) == list(range(grid.world_size))
    for rank in range(grid.world_size):
        place = dataclasses.replace(grid, rank=rank)
        assert grid.ranks[place.coordinates] == rank
        assert rank == place.tp_rank + tp * (place.replica + dp * cp * place.stage)
        assert (place.is_first_stage, place.is_last_stage) == (place.stage == 0, place.stage == pp - 1)


def test_every_head_and_position_has_one_place() -> None:
    grid = RankGrid(tp=2, cp=3)
    places = [dataclasses.replace(grid, rank=rank) for rank in range(6)]
    assert sorted(head for place in places for head in place.heads(12)) == list(range(12))
    for place in places:  # heads are computed among those whose weights are held
        assert set(place.heads(12)) <= set(range(place.tp_rank * 6, place.tp_rank * 6 + 6))
    assert [list(place.positions(6)) for place in places if place.tp_rank == 0] == [[0, 1], [2, 3], [4, 5]]


def test_tensor_parallel_neighbours_are_consecutive() -> None:
    assert np.all(np.diff(RankGrid(tp=4, pp=2, dp=2).ranks, axis=3) == 1)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_grid(rank: int) -> None:
    with pytest.raises(AssertionError):
        RankGrid(tp=2, pp=2, dp=2, rank=rank)


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"),
    [(50_000, 1, 50_048), (50_000, 2, 50_176), (1, 1, 128), (128, 1, 128), (129, 1, 256), (256, 2, 256), (257, 3, 384)],
)
def test_padded_vocabulary(vocab_size: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp) == padded
