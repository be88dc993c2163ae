"""Test our bf16 optimizer against DeepSpeed's own class, and with what it hides behind the passes against without."""

import contextlib
import dataclasses
import gc
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parallel.deepspeed_internals import FlatGroup
from parallel.engine.buckets import parameter_groups
from parallel.engine.sharded_adam import Bucket, Exchange
from parallel.layout import Layout, parse_layout
from parallel.local_ranks import run_ranks
from parallel.micro_batch import micro_batch
from tests.parallel.tiny import VOCAB_SIZE, at_the_wait, tiny_config, training_with
from train.compare.layouts import apply_layout
from train.config import Config

MODULE = "parallel.engine.sharded_adam"


def _config(layout: Layout, **changes: Any) -> Config:
    batch = 4 * layout.dp * (layout.acc or 1)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "seq_length": 128}  # which kernels take
    sizes = sizes if torch.cuda.is_available() else {}
    config = apply_layout(tiny_config(granularity="per_head", global_batch_size=batch, **sizes), layout, Layout(acc=1))
    return dataclasses.replace(training_with(config, precision="bf16"), **changes)


def _trained(engine: Any, config: Config, steps: int = 3) -> tuple[list[Any], list[Tensor]]:
    """Train on random tokens; return what each step measured, and this rank's parameters."""
    grid, reports = engine.groups.grid, []
    generator = torch.Generator().manual_seed(grid.dp_rank)
    shape = (config.training.micro_batch_size, config.model.seq_length + 1)
    for _ in range(steps):
        rows = [torch.randint(VOCAB_SIZE, shape, generator=generator) for _ in range(engine.config.num_micro_batches)]
        batches = [micro_batch(rows_BT.to(engine.device), grid.positions(shape[1] - 1)) for rows_BT in rows]
        reports.append(engine.train_step(iter(batches), 1e-2)[0].wait())
        if len(reports) == 1:  # between steps, while weights are still gathered
            engine.evaluate(iter(batches[:1]), [shape[0]])
    return reports, [parameter.detach().clone() for parameter in engine.stage.parameters()]


def least_elements(count: int) -> Any:
    """Make buckets of tiny models as small as this."""
    return mock.patch.multiple("parallel.config", LEAST_BUCKET=count, LEAST_BUCKET_PER_REPLICA=0)


def _bucket(parameters: list[nn.Parameter]) -> Bucket:
    groups: Any = SimpleNamespace(grid=SimpleNamespace(tp_rank=0))
    exchange = Exchange(groups, 1, torch.float32, overlaps=False, keeps_own_sums=False, summed_late=None)
    for parameter in parameters:
        parameter.tensor_model_parallel = parameter.has_partial_gradient = False
    size = sum(parameter.numel() for parameter in parameters)
    alone: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    return Bucket(
        FlatGroup(parameters, torch.zeros(size + 3, dtype=torch.bfloat16), torch.zeros(size + 3), alone), exchange
    )


def test_sums_are_those_of_the_gradients_given() -> None:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((5, 3), (7,), (2, 2))]
    bucket = _bucket(parameters)
    for step in (((0, 1), (0, 1, 2), (2,)), ((0,), (1, 0))):  # which parameters have a gradient in each micro-batch
        expected = [torch.zeros(parameter.numel()) for parameter in parameters]
        for given in step:
            for index in given:
                gradient = torch.randn_like(parameters[index])
                parameters[index].grad = gradient
                expected[index] += gradient.flatten().float()
            bucket.accumulate()
            assert all(parameter.grad is None for parameter in parameters)
        assert torch.equal(bucket.own, torch.cat([*expected, torch.zeros(3)]))
        bucket.begin_step()


def test_buckets_hold_consecutive_layers_and_the_first_is_the_smallest() -> None:
    from model.transformer import Transformer

    config = tiny_config(num_layers=5, tied_head=False)
    transformer = Transformer(config.model, VOCAB_SIZE)
    for parameter in transformer.parameters():
        parameter.has_partial_gradient = parameter.dim() == 0
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    layer = sum(p.numel() for p in transformer.layers["0"].parameters() if p.dim() == 2)
    with least_elements(layer + 1):
        small, *matrices = parameter_groups(transformer, 0.1, replicas=2)
    held = [
        sorted({names[p].rpartition("attention")[0] or names[p][:8] for p in group["params"]}) for group in matrices
    ]
    assert [" ".join(each) for each in held] == [
        "embeddin", "layers.0 layers.0.", "layers.1 layers.1. layers.2 layers.2.",
        "layers.3 layers.3. layers.4 layers.4.", "head.wei",
    ]  # fmt: skip
    assert small["weight_decay"] == 0.0 and {group["weight_decay"] for group in matrices} == {0.1}
    assert len(parameter_groups(transformer, 0.1, replicas=1)) == 2
    assert len(parameter_groups(transformer, 0.1, replicas=2)) == 4, "the tiny layers make one bucket"


def _with_deepspeeds_own(layout: Layout) -> bool:
    """Return whether this rank's parameters after three steps are those of DeepSpeed's unchanged optimizer."""
    from parallel.engine import engine as module
    from train.parts import build_engine

    config = _config(layout)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, gradient_clipping=0.0))
    own = module.deepspeed_config

    def immediate(*arguments: Any) -> dict[str, Any]:
        derived = own(*arguments)
        derived["bf16"]["immediate_grad_update"] = True  # or the last stage of a pipeline loses its head's gradients
        return derived

    with (
        mock.patch.object(module, "deepspeed_config", immediate),
        mock.patch.object(module, "uses_sharded_adam", lambda config: False),
        mock.patch.object(module, "build_instead", lambda optimizer: None),
    ):
        theirs = build_engine(config, VOCAB_SIZE)
        assert type(theirs.engine.optimizer).__name__ == "BF16_Optimizer"
        _, expected = _trained(theirs, config)
    _, found = _trained(build_engine(config, VOCAB_SIZE, theirs.groups), config)
    assert any(parameter.abs().sum() > 0 for parameter in found)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["acc=2", "dp=2:acc=2", "pp=2:acc=2"])
def test_training_is_deepspeeds_to_the_last_bit(layout: str) -> None:
    parsed = parse_layout(layout)
    assert run_ranks(_with_deepspeeds_own, parsed.world_size, parsed) == [True] * parsed.world_size


def _measured_with(overlaps: bool, layout: Layout, groups: Any) -> tuple[Any, dict[str, Any]]:
    """Train with a bucket of each layer; return the engine, and what tells it from another."""
    from train.parts import build_engine

    config = _config(layout, deepspeed={"zero_optimization": {"overlap_comm": overlaps}})
    with least_elements(1):
        engine = build_engine(config, VOCAB_SIZE, groups)
    optimizer, early = engine.engine.optimizer, 0
    end_of_pass = optimizer.update_hp_grads

    def counted(**arguments: Any) -> None:
        nonlocal early
        early = max(early, len(optimizer.buckets) - len(optimizer._unsent))
        end_of_pass(**arguments)

    with mock.patch.object(optimizer, "update_hp_grads", counted):
        reports, parameters = _trained(engine, config)
    again, _ = _trained(engine, config, steps=1)
    if layout.zero == 2:
        assert not _whole_sums(optimizer.buckets), "ZeRO-2 keeps each replica's own part only"
    unread = [parameter for bucket in optimizer.buckets if bucket._gathering for parameter in bucket.parameters]
    return engine, {"numbers": (reports + again, parameters), "early": early, "unread": unread}


def _whole_sums(buckets: list[Bucket]) -> list[Tensor]:
    """Return the live float32 tensors that are as large as a bucket."""
    sizes = {bucket.weights.numel() for bucket in buckets}
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.dtype == torch.float32]
    return [each for each in tensors if each.untyped_storage().nbytes() // 4 in sizes]


def with_and_without_overlap(layout: Layout) -> tuple[bool, int, int]:
    """Return whether numbers are the same, and how many buckets were not sent early of how many."""
    names = ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce")
    late = SimpleNamespace(**{name: at_the_wait(name) for name in names})
    is_late = contextlib.nullcontext() if torch.cuda.is_available() else mock.patch(f"{MODULE}.dist", late)
    with is_late:
        engine, hidden = _measured_with(True, layout, None)
    _, shown = _measured_with(False, layout, engine.groups)
    (reports, parameters), (expected_reports, expected) = hidden["numbers"], shown["numbers"]
    assert shown["early"] == 0 and not shown["unread"]
    same = reports == expected_reports and all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    buckets = len(engine.engine.optimizer.buckets)
    return same, buckets - hidden["early"], buckets


@pytest.mark.parametrize(
    ("layout", "late"),  # buckets that are complete only when the last backward pass has ended
    [
        ("dp=2:acc=2", 0),
        ("dp=2:acc=2:zero=2", 0),
        ("pp=2:dp=2:acc=2", 1),
        pytest.param("cp=2:acc=2", 0, marks=pytest.mark.slow),
        pytest.param("tp=2:dp=2:sp=1:acc=2", 0, marks=pytest.mark.slow),
    ],
)
def test_what_is_hidden_changes_no_bit(layout: str, late: int) -> None:
    parsed = parse_layout(layout)
    for same, late_buckets, buckets in run_ranks(with_and_without_overlap, parsed.world_size, parsed):
        assert same and late_buckets == late and buckets > 2


def _read_too_early() -> tuple[bool, bool]:
    """Return whether weights read NaN between a step and the next pass, and whether `Engine.stage` makes them whole."""
    layout = parse_layout("dp=2")
    config = _config(layout)
    from train.parts import build_engine

    engine = build_engine(config, VOCAB_SIZE)
    rows_BT = torch.zeros((config.training.micro_batch_size, config.model.seq_length + 1), dtype=torch.int64)
    batches = iter([micro_batch(rows_BT, range(config.model.seq_length))] * 4)
    engine.train_step(batches, 1e-2)
    stage = engine._stage
    early = all(parameter.isnan().all() for parameter in stage.parameters())
    with pytest.raises(RuntimeError, match="single memory location"):
        next(stage.parameters()).data.copy_(torch.zeros(()))
    assert engine.stage is stage
    return early, all(parameter.isfinite().all() for parameter in stage.parameters())


def test_weights_that_are_still_gathered_cannot_be_used_unnoticed() -> None:
    assert run_ranks(_read_too_early, 2) == [(True, True)] * 2


def _averaged() -> list[tuple[int, Tensor]]:
    """Average sums that bf16 could not hold; return start and average of each part that this rank steps."""
    from train.parts import build_engine

    engine = build_engine(_config(parse_layout("dp=3")), VOCAB_SIZE).engine
    buckets = engine.optimizer.buckets
    for bucket in buckets:
        sums = bucket._sums
        sums.copy_(1 + 2**-20 * (torch.distributed.get_rank() + torch.arange(sums.numel()) % 5))
    engine.buffered_allreduce_fallback()
    # a norm counts parts whose gradient may have come from another replica alone
    assert sum(len(bucket.counted) for bucket in buckets) > 1
    return [(bucket.part, bucket.own.clone()) for bucket in buckets]


def test_gradients_are_averaged_in_the_type_they_are_summed_in() -> None:
    ranks = run_ranks(_averaged, 3)
    for parts in zip(*ranks, strict=True):
        assert [start for start, _ in parts] == [rank * parts[0][1].numel() for rank in range(3)]
        average = torch.cat([part for _, part in parts])
        torch.testing.assert_close(average, 1 + 2**-20 * (1 + torch.arange(average.numel()) % 5), rtol=2e-7, atol=0)


def test_a_gradient_after_its_bucket_was_sent_is_an_error() -> None:
    bucket = _bucket([nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))])
    bucket.parameters[0].grad = torch.ones_like(bucket.parameters[0])
    assert bucket.count_gradient()
    bucket.send()
    with pytest.raises(AssertionError, match="after those of its bucket were sent"):
        bucket.count_gradient()
