"""Test that the check finds a copy of a parameter that differs, names it, and stops every rank."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from parallel.layout import Layout, parse_layout
from parallel.local_ranks import run_ranks
from parallel.state.replicas import CHUNK, fingerprint
from tests.parallel.tiny import VOCAB_SIZE, tiny_config
from train.compare.layouts import apply_layout


def _check(layout: Layout, odd_rank: int, name: str | None) -> str | None:
    """Return the check's message on this rank after one bit of a parameter was flipped on `odd_rank`."""
    from model.initialize import named_parameters
    from parallel.state.replicas import ReplicaError, check_replicas
    from train.parts import build_engine

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_fingerprint_is_that_of_the_whole_whatever_the_chunks(dtype: torch.dtype) -> None:
    values = torch.randn(37, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).flatten().tolist()
    wrapped = [
        (total + 2**63) % 2**64 - 2**63 for total in (sum(bits), sum(i * b for i, b in enumerate(bits, start=1)))
    ]
    assert [fingerprint(values, chunk).tolist() for chunk in (1, 7, 11, 406, 407, 408, CHUNK)] == [wrapped] * 7
    assert fingerprint(values.T.contiguous().T, 7).tolist() == wrapped, "how a copy lies in memory is not compared"


@pytest.mark.parametrize("chunk", [4, CHUNK])
def test_a_fingerprint_tells_any_bit_and_any_order(chunk: int) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = [fingerprint(values, chunk)]
    for index, bit in itertools.product(range(12), range(16)):
        other = values.clone()
        other.view(torch.int16)[index] ^= (1 << bit) - (1 << 16) * (bit == 15)
        found.append(fingerprint(other, chunk))
    for first, second in itertools.combinations(range(12), 2):  # in one chunk and over two
        order = list(range(12))
        order[first], order[second] = second, first
        found.append(fingerprint(values[order], chunk))
    assert len({tuple(sums.tolist()) for sums in found}) == len(found)


def test_a_fingerprint_needs_little_memory_however_large_the_parameter() -> None:
    values = torch.zeros(4 * CHUNK + 1, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fingerprint(values)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    taken = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert 0 < max(taken) < 32 * CHUNK, "bytes"
