"""The guard finds a copy of a parameter that differs from the others, names it, and stops every rank."""

import pytest

from parallel.compare import apply_layout
from parallel.layout import Layout, parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import VOCAB_SIZE, tiny_config


def _check(layout: Layout, odd_rank: int, name: str | None) -> str | None:
    """What the check says on this rank after one bit of a parameter was flipped on `odd_rank`."""
    import torch

    from model.initialize import named_parameters
    from parallel.replicas import ReplicaError, check_replicas
    from train.setup import build_engine

    engine = build_engine(apply_layout(tiny_config(), layout, Layout(acc=1)), VOCAB_SIZE)
    if name is not None and engine.groups.grid.rank == odd_rank:
        parameter = dict(named_parameters(engine.stage.transformer))[name]
        bits = getattr(parameter, "ds_tensor", parameter).detach().view(torch.int32).view(-1)
        bits[0] ^= 1
    try:
        check_replicas(engine.stage, engine.groups)
    except ReplicaError as error:
        return str(error)
    return None


@pytest.mark.parametrize("layout", ["tp=2:sp=1:dp=2:zero=2", "pp=2:dp=2", "cp=2:tp=2", "tp=2:dp=2:zero=3:sp=1"])
def test_equal_copies_pass(layout: str) -> None:
    parsed = parse_layout(layout)
    assert run_ranks(_check, parsed.world_size, parsed, 0, None) == [None] * parsed.world_size


@pytest.mark.parametrize(
    ("layout", "odd_rank", "name", "where"),
    [
        ("dp=4", 2, "layers.1.attention.output.weight", r"rank 2 against 0, 1, 3"),
        ("cp=2:dp=2", 3, "layers.0.attention.threshold", r"rank 3 against 0, 1, 2"),
        ("tp=2:sp=1", 1, "layers.3.ffn.fused.weight", r"tensor-parallel ranks"),
        ("tp=2:dp=2:sp=1:zero=3", 1, "layers.0.ffn.beta", r"tensor-parallel ranks"),
        ("pp=2", 1, "head.weight", r"embedding.word.weight \(tied to the head\) differs over pipeline-end"),
    ],
)
def test_one_flipped_bit_is_found(layout: str, odd_rank: int, name: str, where: str) -> None:
    import re

    parsed = parse_layout(layout)
    said = run_ranks(_check, parsed.world_size, parsed, odd_rank, name)
    assert all(said), "every rank must stop"
    named = [line for line in said if line and "another rank" not in line]
    assert named and all(re.search(where, line) for line in named), said
    assert all((name if name != "head.weight" else "embedding") in line for line in named)
