"""Test that every layout computes the losses, gradients and entropies of plain mathematics in one process.

The reference is autograd on `model.Transformer` in float64. A layout runs its training engine in float32, or its stages
in float64. The default run covers a part of the grid in which every axis meets every other; the whole grid is slow.
"""

import itertools
from typing import Any

import pytest
import torch

from parallel.layout import Layout, parse_layout
from tests.parallel.tiny import EREG, assert_layout, measured, plain, tiny_config
from train.compare.comparison import compare

ENGINE = [
    "tp=1",
    "tp=2",
    "tp=4:sp=1",
    "pp=2",  # four layers: 3, 1, since the head costs 1.6
    "pp=3",  # 1, 2, 1
    "dp=2:zero=2",
    "dp=2:zero=3",
    "cp=2",
    "dp=2:cp=2:zero=1",
    "tp=2:dp=2:zero=3",
    "tp=2:pp=2:sp=1",
    "tp=2:pp=2:dp=2:sp=1",
    "tp=2:pp=2:cp=2:sp=1:recompute=full",
    "tp=2:sp=1:recompute=selective",
]
EXACT = [
    "tp=2:sp=1:acc=1",
    "tp=4:sp=1:acc=4:recompute=full",
    "pp=4:acc=4",
    "dp=4:acc=1",
    "cp=2:dp=2:recompute=selective",
    "tp=2:cp=2:dp=2:sp=1:acc=1",
    "tp=2:pp=2:cp=2:sp=1",
]


@pytest.mark.parametrize("layout", ENGINE)
def test_the_engine_in_float32(layout: str) -> None:
    assert_layout(parse_layout(layout), "float32", architecture=EREG)


@pytest.mark.parametrize("layout", ["tp=2:pp=2:acc=4", "tp=2:sp=1:dp=2", "pp=2:cp=2", "tp=2:zero=2"])
def test_the_engine_in_bf16(layout: str) -> None:
    """Rounding changes a small gradient by 5% and the norm by 0.1%; counting a part twice or not at all, far more."""
    config, parsed = tiny_config(), parse_layout(layout)
    result = compare(measured(config, parsed, "bf16"), plain(config, parsed.acc or 2))
    assert result.gradient < 0.15 and result.gradient_norm < 5e-3, result
    assert result.loss < 1e-3 and result.entropy_nats < 1e-2, result


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_gradients_of_many_micro_batches_are_summed_in_float32(zero_stage: int) -> None:
    """After 64 micro-batches a sum in bf16 is off by 1.25%; in float32 the errors average out and leave 0.56%."""
    config, layout = tiny_config(global_batch_size=256), parse_layout(f"dp=2:zero={zero_stage}:acc=64")
    found, expected = measured(config, layout, "bf16").gradients[0], plain(config, 64).gradients[0]
    error = torch.cat([(found[name].double() - gradient).flatten() for name, gradient in expected.items()])
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert error.norm() < 0.008 * whole.norm()


@pytest.mark.parametrize("layout", EXACT)
def test_stages_in_float64(layout: str) -> None:
    assert_layout(parse_layout(layout), "float64", architecture=EREG)


@pytest.mark.parametrize("layout", ["dp=2:acc=2", "tp=2:dp=2:cp=2:sp=1:acc=1", "pp=2:dp=2:acc=2:recompute=full"])
def test_per_head_granularity(layout: str) -> None:
    assert_layout(parse_layout(layout), "float64", architecture=EREG, granularity="per_head")


@pytest.mark.parametrize("layout", ["dp=2:acc=2:zero=3", "pp=2:dp=2:acc=2", "dp=2:cp=2:acc=2"])
def test_per_head_granularity_through_the_engine(layout: str) -> None:
    assert_layout(parse_layout(layout), "float32", architecture=EREG, granularity="per_head")


VARIANTS = [
    ("tp=2:cp=2:sp=1:acc=1", "float64", {"shape": "hinge", "target": "causal", "within_documents": True}),
    ("pp=2:dp=2:acc=2", "float32", {"shape": "floor", "threshold_init": 1.0, "temperature_init": "calibrated"}),
    ("dp=2:acc=2", "float64", {"shape": "hinge", "granularity": "per_head"}),
    ("tp=2:pp=2:acc=2", "float64", {"shape": "hinge", "margin": [0.3, 0.02, 0.1, 0.05], "temperature": "per_head"}),
]


@pytest.mark.parametrize(("layout", "dtype", "variant"), VARIANTS)
def test_variants_of_penalty_and_temperature(layout: str, dtype: str, variant: dict[str, Any]) -> None:
    assert_layout(parse_layout(layout), dtype, architecture=EREG, **variant)


BIASES = [("tp=2:sp=1:acc=1", EREG), ("tp=2:cp=2", "SM+LN+G"), ("tp=4:sp=1:recompute=selective", "SM+LN+G")]


@pytest.mark.parametrize(("layout", "architecture"), BIASES)
def test_all_biases(layout: str, architecture: str) -> None:
    assert_layout(parse_layout(layout), "float64", architecture=architecture, biases="all")


DOCUMENTS = [
    ("tp=2:cp=2:sp=1:recompute=full", "float64"),
    ("tp=2:pp=2:recompute=selective", "float64"),
    ("pp=2:cp=2:recompute=full", "float32"),
    ("dp=2:zero=3", "float32"),
]


@pytest.mark.parametrize(("layout", "dtype"), DOCUMENTS)
def test_attention_within_documents(layout: str, dtype: str) -> None:
    assert_layout(parse_layout(layout), dtype, architecture=EREG, within_documents=True)


@pytest.mark.parametrize(("layout", "dtype"), [("tp=4:sp=1", "float64"), ("tp=2:sp=1:cp=2:recompute=full", "float32")])
def test_a_fused_ffn_split_under_sequence_parallelism(layout: str, dtype: str) -> None:
    assert_layout(parse_layout(layout), dtype, architecture=EREG, fused_ffn="split")


FUSED = {
    "scaled": {},
    "unscaled": {"scaled_ffn": False},
    "a norm before": {"norm": "layernorm"},  # the residual is no part of the matrix
    "weight norm": {"weight_norm": "FFN"},
    "spectral norm": {"spectral_norm": "FFN", "spectral_gain": True},
}


@pytest.mark.parametrize("layout", ["tp=2", "tp=2:sp=1"])
@pytest.mark.parametrize("ingredient", FUSED)
def test_a_fused_ffn_with_its_columns_split(ingredient: str, layout: str) -> None:
    choices = FUSED[ingredient]
    assert_layout(parse_layout(layout), "float64", architecture="SM+ScFuFFN", fused_ffn="split", **choices)


@pytest.mark.parametrize("ingredient", FUSED)
def test_a_fused_ffn_replicated_under_sequence_parallelism(ingredient: str) -> None:
    choices = FUSED[ingredient]
    layout = parse_layout("tp=2:sp=1")
    assert_layout(layout, "float64", architecture="SM+ScFuFFN", fused_ffn="replicated", **choices)


def test_saturated_attention_over_five_ranks() -> None:
    """Scores reach a hundred; float32 would lose 1e-4 of them even on one process."""
    sizes = {"num_layers": 2, "num_attention_heads": 15, "hidden_size": 75, "seq_length": 25}
    choices = {"architecture": "SM+LN+G", "temperature": "per_head", "within_documents": True}
    assert_layout(parse_layout("tp=5"), "float64", **sizes, **choices)


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+TN", "EReg(SM(t)+R)", "SM+ScFFN", "SM(t)+ScFuFFN"])
def test_other_architectures(architecture: str) -> None:
    layout = parse_layout("tp=2:pp=2:cp=2:sp=1:recompute=selective")
    assert_layout(layout, "float64", architecture=architecture)


@pytest.mark.parametrize("normalization", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("layout", ["tp=2:sp=1", "tp=2:cp=2:acc=1"])
def test_normalized_weights(normalization: str, layout: str) -> None:
    gain = normalization == "spectral_norm"
    assert_layout(parse_layout(layout), "float64", architecture="SM", spectral_gain=gain, **{normalization: "QKVO+FFN"})


@pytest.mark.parametrize("layout", ["tp=2:pp=2", "tp=2:cp=2:sp=1"])
def test_untied_head_rotary_positions_a_temperature_per_head_and_no_final_norm(layout: str) -> None:
    choices = {"tied_head": False, "positions": "rotary", "final_norm": False, "temperature": "per_head"}
    assert_layout(parse_layout(layout), "float64", architecture=EREG, **choices)


def whole_grid() -> list[Layout]:
    """Return every combination that fits eight processes and that the libraries support."""
    layouts = []
    for tp, pp, dp, cp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)):
        for sp, zero, acc, recompute in itertools.product((0, 1), (1, 2, 3), (1, 4), ("none", "full")):
            possible = not (sp and tp == 1) and not (zero > 1 and pp > 1)
            if possible and tp * pp * dp * cp <= 8:
                layouts.append(Layout(tp, pp, dp, cp, sp, zero, acc, recompute))
    return layouts


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
@pytest.mark.parametrize("layout", whole_grid(), ids=str)
def test_the_whole_grid_in_float32(layout: Layout, granularity: str) -> None:
    assert_layout(layout, "float32", architecture=EREG, granularity=granularity, global_batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
@pytest.mark.parametrize("layout", [each for each in whole_grid() if each.zero == 1], ids=str)
def test_the_whole_grid_in_float64(layout: Layout, granularity: str) -> None:
    assert_layout(layout, "float64", architecture=EREG, granularity=granularity, global_batch_size=16)
