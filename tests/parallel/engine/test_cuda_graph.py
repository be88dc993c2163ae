"""Test the results of a replayed training pass without a GPU: the capture here runs the pass as it is."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.engine.cuda_graph import CaptureError, replay_training_passes
from parallel.engine.engine import replays
from parallel.engine.telemetry import METRICS
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage, StageStatistics
from parallel.sharding.transport import Collectives, PeerCopies
from tests.parallel.tiny import VOCAB_SIZE, tiny_config, training_with
from train.parts import build_engine, build_stage

SEQUENCES = 3


def _micro_batches(count: int, sequences: int = SEQUENCES) -> list[MicroBatch]:
    shape = (tiny_config().model.seq_length + 1, sequences)
    return [MicroBatch(tokens[:-1], tokens[1:]) for tokens in (torch.randint(VOCAB_SIZE, shape) for _ in range(count))]


def _step(stage: Stage, batches: list[MicroBatch]) -> tuple[StageStatistics, list[Tensor]]:
    stage.train().zero_grad()
    for batch in batches:
        stage(*batch.tensors).backward()
    gradients = [parameter.grad for parameter in stage.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return stage.take_statistics(), [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
def test_a_step_measures_and_gives_what_it_did(granularity: str, one_process: Groups) -> None:
    stage, _ = build_stage(tiny_config(granularity=granularity), VOCAB_SIZE, groups=one_process)
    batches = _micro_batches(3)
    expected, expected_gradients = _step(stage, batches)
    overwritten: list[Tensor] = []

    def capture(training_pass: nn.Module, micro_batch: Any) -> Any:
        training_pass(*micro_batch)[0].backward()  # as it warms up
        stage.zero_grad()

        def replay(*micro_batch: Tensor) -> tuple[Tensor, ...]:
            for old in overwritten:
                old.fill_(torch.nan)
            loss, *measured = training_pass(*micro_batch)
            overwritten[:] = measured
            return loss, *measured

        return replay

    replay_training_passes(stage, capture)
    for _ in range(2):
        found, gradients = _step(stage, batches)
        assert (found.micro_batches, found.sequences) == (expected.micro_batches, expected.sequences)
        assert torch.equal(found.entropy_LN, expected.entropy_LN)
        assert found.sums.keys() == expected.sums.keys() == METRICS.keys() - {"distillation_loss"}
        for name, value in found.sums.items():
            assert torch.equal(value, expected.sums[name]), name
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    assert found.sums["ce_loss"] > 0 and found.sums["entropy_loss"] > 0 and found.micro_batches == 3


def test_each_shape_is_captured_once_and_evaluation_never(one_process: Groups) -> None:
    stage, _ = build_stage(tiny_config(), VOCAB_SIZE, groups=one_process)
    captured: list[int] = []

    def capture(training_pass: nn.Module, micro_batch: Any) -> nn.Module:
        captured.append(micro_batch[0].shape[1])
        return training_pass

    replay_training_passes(stage, capture)
    for sequences in (SEQUENCES, SEQUENCES, 2, SEQUENCES):
        _step(stage, _micro_batches(1, sequences))
    stage.eval()
    stage(*_micro_batches(1, 5)[0].tensors)
    assert captured == [SEQUENCES, 2]


def test_no_gradient_node_outlives_what_made_it(one_process: Groups) -> None:
    """A gradient node that stays alive keeps its stream, and a capture that meets the default stream is refused."""

    def kept(stage: nn.Module) -> int:
        def node(parameter: nn.Parameter) -> Any:
            return parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

        for parameter in stage.parameters():
            node(parameter).metadata["seen"] = True
        return sum("seen" in node(parameter).metadata for parameter in stage.parameters())

    config = training_with(tiny_config(), precision="bf16")
    engine = build_engine(config, VOCAB_SIZE, one_process)
    assert kept(engine.stage) == 0
    held, found = [], []

    def capture(training_pass: nn.Module, micro_batch: Any) -> Any:
        for _ in range(2):  # it keeps what it captured, as what captures does
            found.append(kept(engine.stage))
            held.append(training_pass(*micro_batch))
            held[-1][0].backward()

        def replay(*micro_batch: Tensor) -> Any:
            found.append(kept(engine.stage))
            return training_pass(*micro_batch)

        return replay

    replay_training_passes(engine.stage, capture)
    engine.train_step(iter(_micro_batches(config.num_micro_batches(1))), 1e-3)
    assert found[:3] == [0, 40, 0] and len(list(engine.stage.parameters())) == 40


def test_with_replicas_only_short_passes_are_replayed() -> None:
    one, long, short = ParallelConfig(), 1e15, 1e9
    assert one.replays_passes(1, True, long)
    assert one.replays_passes(2, False, short) and ParallelConfig(context_parallel_size=2).replays_passes(
        1, True, short
    )
    assert not one.replays_passes(2, False, long)
    assert not ParallelConfig(context_parallel_size=2).replays_passes(1, False, long)


def test_what_outlives_a_pass_is_not_replayed() -> None:
    assert not ParallelConfig().replays_passes(2, per_head=True, block_flops=1e9)
    assert not ParallelConfig(pipeline_parallel_size=2).replays_passes(1, False, 1e9)
    assert not ParallelConfig(tensor_parallel_size=2).replays_passes(1, False, 1e9)
    assert not ParallelConfig(zero_stage=3).replays_passes(1, False, 1e9)


def test_exchanges_by_collectives_are_not_replayed(one_process: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_with(tiny_config(), precision="bf16")
    engine = build_engine(config, VOCAB_SIZE, one_process)
    on_gpu = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(is_cuda=True)]),
        regularizer=None,
        distillation=None,
        transformer=engine.stage.transformer,
    )
    wanted: Any = dataclasses.replace(engine.config, cuda_graphs=True)
    grid = SimpleNamespace(tp=1, cp=2, dp=1)
    for by in (Collectives, PeerCopies):
        monkeypatch.setattr("parallel.engine.engine.transport", lambda group, by=by: by)
        groups: Any = SimpleNamespace(grid=grid, context=None)
        assert replays(on_gpu, groups, wanted) == (by is PeerCopies)  # type: ignore[arg-type]


ENDED = RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nCompile with"), ENDED, CaptureError),
        (RuntimeError("operation not permitted when stream is capturing"), None, CaptureError),
        (torch.OutOfMemoryError("CUDA out of memory."), ENDED, torch.OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory."), None, torch.OutOfMemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None, RuntimeError),
        (NotImplementedError(), None, NotImplementedError),
    ],
)
def test_what_cannot_be_captured_is_said_with_the_remedy(
    first: RuntimeError, then: RuntimeError | None, expected: type[RuntimeError], one_process: Groups
) -> None:
    stage, _ = build_stage(tiny_config(), VOCAB_SIZE, groups=one_process)

    def capture(training_pass: nn.Module, micro_batch: Any) -> Any:
        try:
            raise first
        finally:
            if then is not None:
                raise then

    replay_training_passes(stage, capture)
    with pytest.raises(RuntimeError) as raised:
        _step(stage, _micro_batches(1))
    assert type(raised.value) is expected
    if expected is CaptureError:
        assert str(raised.value).endswith(
            "(operation not permitted when stream is capturing); set training.cuda_graphs=off"
        )


def test_a_micro_batch_stays_the_callers(one_process: Groups) -> None:
    """A replay reads its inputs from the tensors that were captured."""
    stage, _ = build_stage(tiny_config(), VOCAB_SIZE, groups=one_process)
    batches = _micro_batches(2)
    before = [tuple(each.clone() for each in batch.tensors) for batch in batches]
    losses = [stage.train()(*batch.tensors).item() for batch in batches]

    def capture(training_pass: nn.Module, static: Any) -> Any:
        def replay(*micro_batch: Tensor) -> Any:
            for place, given in zip(static, micro_batch, strict=True):
                place.copy_(given)
            return training_pass(*static)

        return replay

    replay_training_passes(stage, capture)
    assert [stage(*batch.tensors).item() for batch in batches] == losses
    for batch, kept in zip(batches, before, strict=True):
        assert all(map(torch.equal, batch.tensors, kept))
