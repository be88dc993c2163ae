"""Tests of the engine that need a GPU."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups
from tests.parallel.engine.test_sharded_adam import with_and_without_overlap
from tests.parallel.tiny import VOCAB_SIZE, tiny_config, training_with
from train.benchmark.timing import count_device_waits
from train.config import Config
from train.parts import build_engine, build_groups

pytestmark = pytest.mark.gpu
MICRO_BATCH_SIZE, SEQ_LENGTH = 4, 128


def _config(model: dict[str, Any], training: dict[str, Any], granularity: str = "per_query") -> Config:
    config = tiny_config(
        hidden_size=256, num_attention_heads=4, seq_length=SEQ_LENGTH, granularity=granularity, **model
    )
    sizes = {"precision": "bf16", "micro_batch_size": MICRO_BATCH_SIZE, "global_batch_size": 2 * MICRO_BATCH_SIZE}
    return training_with(config, **sizes, **training)


def _micro_batches(within_documents: bool = False) -> Iterator[MicroBatch]:
    generator = torch.Generator().manual_seed(7)
    while True:
        tokens = torch.randint(VOCAB_SIZE, (SEQ_LENGTH + 1, MICRO_BATCH_SIZE), generator=generator).cuda()
        start = torch.arange(SEQ_LENGTH, device="cuda").div(40, rounding_mode="floor").mul(40)
        documents = start.expand(MICRO_BATCH_SIZE, -1).contiguous() if within_documents else None
        yield MicroBatch(tokens[:-1], tokens[1:], documents)


def test_a_step_never_waits_for_the_device(one_process: Groups) -> None:
    engine = build_engine(_config({}, {}), VOCAB_SIZE, one_process)
    batches = list(itertools.islice(_micro_batches(), 2))
    for _ in range(3):
        report, _ = engine.train_step(iter(batches), 1e-3)
    assert report.wait().accepted
    assert count_device_waits(lambda: engine.train_step(iter(batches), 1e-3)) == 0


@pytest.mark.parametrize(
    ("model", "training", "granularity", "within_documents"),
    [
        ({}, {"compile": "on"}, "per_query", False),
        ({}, {}, "per_head", True),
        ({}, {"activation_recompute": "full"}, "per_query", False),
        ({}, {"activation_recompute": "selective", "compile": "on"}, "per_query", True),
        ({"architecture": "SM+LN+G"}, {}, "per_query", False),
        ({"architecture": "SM+TN"}, {"compile": "on"}, "per_query", False),
        ({"architecture": "SM+ScFuFFN", "spectral_norm": "QK+FFN"}, {}, "per_query", False),
    ],
)
def test_replayed_steps_are_those_launched_one_by_one(
    model: dict[str, Any], training: dict[str, Any], granularity: str, within_documents: bool, one_process: Groups
) -> None:
    config = _config(model, {"compile": "off"} | training, granularity)
    _compare_with_launched(config, within_documents, one_process)


def _compare_with_launched(config: Config, within_documents: bool, groups: Groups) -> None:
    """Assert that replayed and launched steps are the same to the last bit."""
    positions = groups.grid.positions(SEQ_LENGTH)

    def trained(cuda_graphs: str) -> tuple[list[tuple[float, ...]], list[Tensor]]:
        engine = build_engine(training_with(config, cuda_graphs=cuda_graphs), VOCAB_SIZE, groups)
        assert ("forward" in vars(engine.stage)) == (cuda_graphs == "auto")  # replaced by what replays
        batches, measured = (_held(each, positions) for each in _micro_batches(within_documents)), []
        for step in range(5):
            falling = 1.0 - 0.2 * step
            report, statistics = engine.train_step(batches, 1e-3, penalty_strength=falling, norm_gate=falling)
            if step == 2:
                statistics = engine.evaluate(batches, [MICRO_BATCH_SIZE, 1])
            numbers = *statistics.sums.values(), statistics.entropy_LN.sum()
            counts = statistics.micro_batches, statistics.sequences
            done = report.wait()
            decided = done.gradient_norm, done.stop_requested, done.accepted
            measured.append((*done.means.values(), *decided, *map(float, numbers), *counts))
        state = *engine.stage.parameters(), *engine.stage.buffers()
        return measured, [tensor.detach().clone() for tensor in state]

    (replayed, parameters), (launched, expected) = trained("auto"), trained("off")
    assert replayed == launched
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert len({numbers[0] for numbers in replayed}) == 5  # each step was another


def _held(batch: MicroBatch, positions: range) -> MicroBatch:
    here = slice(positions.start, positions.stop)
    return MicroBatch(batch.tokens_TB[here], batch.labels_TB[here], batch.document_start_BT)


def _replayed_over_ranks() -> None:
    config = _config({}, {"compile": "on"})
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context_parallel_size=2))
    _compare_with_launched(config, within_documents=True, groups=build_groups(config))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_exchanges_within_a_pass_are_replayed_with_it() -> None:
    run_ranks(_replayed_over_ranks, 2, use_gpu=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["dp=2:acc=2", "dp=2:acc=2:zero=2", "cp=2:acc=2"])
def test_what_is_hidden_changes_no_bit_over_nccl(layout: str) -> None:
    for same, late, buckets in run_ranks(with_and_without_overlap, 2, parse_layout(layout), use_gpu=True):
        assert same and late == 0 and buckets > 3
