"""Test what ranks send: predicted by formulas against counted while running, and the consequences for large models."""

import dataclasses
import re
from typing import Any

import pytest

from parallel.counting.footprint import Workload, held_parameters
from parallel.counting.volume import Volume, block_volume, volume
from parallel.engine.telemetry import METRICS
from parallel.grid import RankGrid
from parallel.layout import Layout, parse_layout
from tests.parallel.tiny import EREG, VOCAB_SIZE, measured, tiny_config
from train.compare.layouts import apply_layout, reference_layout
from train.config import Config, load_config

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


def predicted(config: Config, layout: Layout, element_bytes: int = FLOAT32_BYTES) -> Volume:
    """Return for each axis the bytes of the rank that sends most."""
    applied = apply_layout(config, layout, reference_layout(config, [layout]))
    volumes = [
        volume(workload(applied, applied.grid(layout.world_size, rank)), element_bytes, FLOAT32_BYTES)
        for rank in range(layout.world_size)
    ]
    axes = [field.name for field in dataclasses.fields(Volume)]
    return Volume(**{axis: max(getattr(each, axis) for each in volumes) for axis in axes})


def workload(config: Config, grid: RankGrid) -> Workload:
    return Workload(
        config.model,
        config.parallel,
        grid,
        vocab_size=config.data.planned_vocab_size or 0,
        micro_batch_size=config.training.micro_batch_size,
        num_micro_batches=config.num_micro_batches(grid.world_size),
        recompute=config.training.activation_recompute,
        per_head=config.regularizer.granularity == "per_head",
    )


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [
        ("tp=2", EREG),
        ("tp=2:sp=1:acc=4", EREG),
        ("tp=2:sp=1:recompute=full", "SM+LN+G"),
        ("tp=2:recompute=full", "SM+ScFFN"),
        ("tp=2:recompute=full", EREG),
        ("tp=2:sp=1:recompute=full", EREG),
        ("tp=2:cp=2:pp=2:sp=1", EREG),
        ("dp=2:cp=2", EREG),
        ("dp=2:zero=2", "SM+ScFFN"),
    ],
)
def test_counted_is_predicted(layout: str, architecture: str) -> None:
    config, parsed = tiny_config(architecture=architecture, granularity="per_head"), parse_layout(layout)
    expected, counted = predicted(config, parsed), measured(config, parsed, "float32").sent_bytes
    assert counted.get("tensor", 0) == expected.tensor
    assert counted.get("context", 0) == expected.context
    assert counted.get("batch", 0) == expected.entropy * config.model.regularized
    scalars = 32 + 64  # norms and overflow flags; the step's report, four numbers over all ranks
    assert expected.data <= counted.get("data", 0) <= expected.data + scalars
    assert expected.embedding_ends <= counted.get("embedding_ends", 0) <= expected.embedding_ends + scalars
    headers = 1024  # DeepSpeed announces shapes once
    assert expected.pipeline <= counted.get("pipeline", 0) <= expected.pipeline + headers
    report = 2 * 8 * (len(METRICS) + 2)  # where all ranks are no axis, nothing else is sent among them
    assert counted.get("other", 0) <= report


@pytest.mark.parametrize("layout", ["dp=2", "dp=2:cp=2:acc=2", "dp=2:tp=2:acc=2", "dp=2:pp=2:acc=2"])
def test_in_bf16_gradients_are_scattered_in_float32_and_weights_gathered(layout: str) -> None:
    config, parsed = tiny_config(), parse_layout(layout)
    expected, counted = predicted(config, parsed, BFLOAT16_BYTES), measured(config, parsed, "bf16").sent_bytes
    padding = 16 * (FLOAT32_BYTES + BFLOAT16_BYTES)  # of two flat buffers
    assert expected.data <= counted["data"] <= expected.data + padding + 96
    assert expected.data / counted["data"] > 0.99


def test_a_penalty_for_each_query_sends_nothing() -> None:
    assert "batch" not in measured(tiny_config(), parse_layout("dp=2:cp=2"), "float64").sent_bytes


def test_a_fused_ffn_halves_what_a_block_sends_under_sequence_parallelism() -> None:
    """Count a third layer's bytes in a step of four micro-batches minus one of two, which leaves activations alone."""

    def activation_bytes(architecture: str) -> int:
        def sent(num_layers: int, acc: int) -> int:
            config = tiny_config(architecture=architecture, num_layers=num_layers, global_batch_size=2 * acc)
            return measured(config, parse_layout(f"tp=2:sp=1:acc={acc}"), "float64").sent_bytes["tensor"]

        return (sent(3, 4) - sent(3, 2)) - (sent(2, 4) - sent(2, 2))

    assert activation_bytes("SM+ScFuFFN") * 2 == activation_bytes("SM+LN+G")


@pytest.mark.parametrize(("hidden_size", "replicated"), [(64, True), (80, False)])
def test_the_cheaper_form_of_a_fused_ffn_is_chosen(hidden_size: int, replicated: bool) -> None:
    """At 48 tokens a step and tp = 2 both forms send the same at a width of 72."""
    config = tiny_config(hidden_size=hidden_size)
    for forced in ("auto", "replicated", "split"):
        parallel = dataclasses.replace(
            config.parallel, tensor_parallel_size=2, sequence_parallel=True, fused_ffn=forced
        )
        work = Workload(config.model, parallel, RankGrid(tp=2), VOCAB_SIZE, micro_batch_size=3, num_micro_batches=1)
        sent = block_volume(work, work.tokens * hidden_size) - 5 / 2 * work.tokens * hidden_size  # without attention
        sent += 2 / 2 * hidden_size**2 if work.replicates_fused_ffn else 0  # the gradient's sum
        if forced == "auto":
            assert work.replicates_fused_ffn == replicated
            chosen = sent
        assert sent >= chosen


def test_entropies_of_a_1b_model_are_a_ten_thousandth_of_a_steps_traffic() -> None:
    config = load_config("configs/ereg_1b.json", ["regularizer.granularity=per_head"])
    for sizes in ({"dp": 16}, {"dp": 4, "tp": 4}, {"dp": 2, "tp": 2, "pp": 4}, {"dp": 4, "cp": 4}):
        grid = RankGrid(**sizes)
        parallel: Any = dataclasses.replace(config.parallel, tensor_parallel_size=grid.tp)
        micro_batches = 512 // (config.training.micro_batch_size * grid.dp)
        work = Workload(
            config.model, parallel, grid, 50_000, config.training.micro_batch_size, micro_batches, per_head=True
        )
        sent = volume(work, 2, 4)
        assert 0 < sent.entropy < 1e-4 * sent.total


@pytest.mark.parametrize("layout", ["tp=1", "tp=2:pp=3", "tp=2:cp=2:sp=1"])
def test_held_parameters_are_the_ones_that_ranks_hold(layout: str) -> None:
    from parallel.local_ranks import run_ranks

    parsed = parse_layout(layout)
    for architecture in (EREG, "SM+LN+G"):
        applied = apply_layout(tiny_config(architecture=architecture), parsed, Layout(acc=2))
        ranks = run_ranks(_sizes, parsed.world_size, applied)
        for rank, sizes in enumerate(ranks):
            held = held_parameters(workload(applied, applied.grid(parsed.world_size, rank)))
            kinds = {name: [each.size] * each.copies for name, each in held.items()}
            assert kinds == sizes


def _sizes(config: Config) -> dict[str, list[int]]:
    """Return the sizes of every kind of parameter on this rank, under the name that it has in layer 0."""
    from model.initialize import named_parameters
    from train.parts import build_stage

    stage, _ = build_stage(config, config.data.planned_vocab_size or 0)
    sizes: dict[str, list[int]] = {}
    for name, parameter in named_parameters(stage.transformer):
        sizes.setdefault(re.sub(r"^layers\.\d+", "layers.0", name), []).append(parameter.numel())
    return sizes
