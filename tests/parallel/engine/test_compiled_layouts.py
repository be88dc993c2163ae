"""Test that every layout, compiled, computes the losses, gradients and entropies of plain mathematics in one process.

Gradients were lost in tracing and autograd, so the default run stops the compiler behind them ('aot_eager'): generating
code for a CPU takes half a minute a layout. One layout is compiled in full, and all of them in the slow run.
"""

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import BATCHES, EREG, plain, tiny_config, training_with
from train.compare.comparison import TOLERANCE, compare
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import Measured, assemble

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("tp=1", {}),
    ("tp=2", {}),
    ("tp=2:sp=1", {}),
    ("cp=2", {}),
    ("pp=2", {}),
    ("dp=2:zero=2", {}),
    ("dp=2:zero=3", {}),
    ("tp=2:sp=1:recompute=selective", {"fused_ffn": "split"}),
    ("cp=2:recompute=full", {"within_documents": True}),
    ("dp=2:acc=2:zero=3:recompute=full", {"granularity": "per_head"}),
    ("tp=2", {"architecture": "SM+LN+G"}),
    ("tp=2:sp=1:recompute=full", {"architecture": "SM+TN", "temperature": "per_head", "temperature_init": 1.0}),
    ("tp=2:sp=1", {"architecture": "SM+ScFFN", "weight_norm": "QKVO+FFN"}),
    ("tp=2:sp=1", {"architecture": "SM+ScFuFFN", "spectral_norm": "FFN", "fused_ffn": "split"}),
    ("pp=2:cp=2", {"positions": "rotary", "tied_head": True}),
]
MORE = ["tp=2:pp=2:cp=2:sp=1:recompute=full", "tp=2:dp=2:zero=3", "cp=2:dp=2", "tp=4:sp=1:acc=4"]
ZERO_3 = "dp=2:zero=3"


def compiled_on_rank(config: Any, vocab_size: int, batches: torch.Tensor, backend: str) -> dict[str, Any]:
    """Measure as `train.compare.measurement` does with compiled blocks; also return each graph's autograd functions."""
    from train.compare import measurement

    graphs: list[list[str]] = []
    compile_with = torch._dynamo.lookup_backend(backend)

    def recording(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        targets = [str(node.target) for part in parts for node in part.graph.nodes]
        graphs.append([target for target in targets if "autograd_function" in target])
        return compile_with(graph, inputs)

    with mock.patch("torch.compile", functools.partial(torch.compile, backend=recording)):
        step = measurement.EngineStep(config, vocab_size)
    losses, gradients, entropies = [], [], []
    for batch in batches:
        statistics = step.run(measurement._micro_batches(config, step.groups.grid, batch))
        losses.append(step.losses(statistics))
        gradients.append(measurement._local_gradients(step))
        from parallel.engine.telemetry import head_snapshot

        heads = head_snapshot(step.stage, statistics, step.groups)
        entropies.append(torch.tensor(heads.entropy_nats, dtype=torch.float64))
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "gradients": gradients,
        "entropy_nats": entropies,
        "graphs": graphs,
    }


def assert_compiled(text: str, backend: str, **choices: Any) -> None:
    layout = parse_layout(text)
    config = tiny_config(**{"architecture": EREG, **choices})
    reference = reference_layout(config, [layout])
    vocab_size, batches = global_batches(config, BATCHES)
    applied = training_with(apply_layout(config, layout, reference), compile="on")
    ranks = run_ranks(compiled_on_rank, layout.world_size, applied, vocab_size, batches, backend)
    gradients = [assemble([rank["gradients"][i] for rank in ranks], vocab_size) for i in range(BATCHES)]
    found = Measured(ranks[0]["losses"], gradients, ranks[0]["entropy_nats"], {})
    result = compare(found, plain(config, reference.acc or 1))
    assert result.within(TOLERANCE["float32"]), result
    normalized = config.model.weight_norm != "none" or config.model.spectral_norm != "none"
    for rank in ranks:
        # torch gives each parametrized layer a class of its own, so that blocks with normalized weights are not alike
        assert len(rank["graphs"]) == (config.model.num_layers if normalized else 1), (
            "blocks that are alike compile once"
        )
        assert {len(functions) for functions in rank["graphs"]} == {1}, "none is traced but that of the biases"


@pytest.mark.parametrize(("layout", "choices"), LAYOUTS)
def test_a_compiled_layout(layout: str, choices: dict[str, Any]) -> None:
    assert_compiled(layout, "aot_eager", **choices)


def test_a_compiled_layout_with_generated_code() -> None:
    assert_compiled(ZERO_3, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "choices"), [*LAYOUTS, *((layout, {}) for layout in MORE)])
def test_every_compiled_layout_with_generated_code(layout: str, choices: dict[str, Any]) -> None:
    assert_compiled(layout, "inductor", **choices)
