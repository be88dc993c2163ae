"""Counts are held against the paper's figures, the model's own parameters, and the operations that torch counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ARCHITECTURES, ModelConfig
from model.transformer import global_shapes
from train.cost.flops import (
    NonlinearOperation,
    device_peak_tflops,
    forward_flops,
    mfu,
    mfu_statement,
    nonlinear_operations,
    training_flops_per_token,
)


def model(architecture: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(architecture=architecture, **sizes).resolved()


@pytest.mark.parametrize(
    ("architecture", "seq_length", "ffn", "attention"),
    [  # GPT-2 small, in units of 1e9: 16 L T d^2, 2 L T d^2 and L (8 T d^2 + 3 T^2 d) worked out by hand
        ("SM+LN+G", 128, 14.496, 7.701),
        ("SM+LN+G", 256, 28.991, 16.307),
        ("EReg(SM(t)+ScFuFFN)", 128, 1.812, 7.701),
    ],
)
def test_forward_flops_of_the_published_models(
    architecture: str, seq_length: int, ffn: float, attention: float
) -> None:
    flops = forward_flops(model(architecture, seq_length=seq_length))
    assert flops.ffn / 1e9 == pytest.approx(ffn, abs=5e-4)
    assert flops.attention / 1e9 == pytest.approx(attention, abs=5e-4)
    assert flops.total == flops.ffn + flops.attention


def test_nonlinear_operations_of_the_baseline_and_of_the_softmax_only_model() -> None:
    baseline = nonlinear_operations(model("SM+LN+G"))
    assert baseline == {
        "softmax": NonlinearOperation(144, 128, 128),
        "layernorm": NonlinearOperation(24, 128, 768),
        "final_layernorm": NonlinearOperation(1, 128, 768),
        "gelu": NonlinearOperation(12, 128, 3072),
    }
    assert baseline["gelu"].elements == 12 * 128 * 3072
    assert list(nonlinear_operations(model("EReg(SM(t)+ScFuFFN)", final_norm=False))) == ["softmax"]
    assert "relu" in nonlinear_operations(model("SM+R"))


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_flops_count_every_matrix_that_multiplies(architecture: str, tied_head: bool) -> None:
    sizes = model(
        architecture,
        num_layers=3,
        hidden_size=24,
        num_attention_heads=4,
        seq_length=10,
        ffn_hidden_size=40,
        tied_head=tied_head,
    )
    vocab_size = 50
    shapes = global_shapes(sizes, vocab_size)
    matrices = [shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    parameters = sum(shape.numel() for shape in matrices) - sizes.seq_length * sizes.hidden_size  # positions are added
    if not tied_head:
        parameters -= shapes["embedding.word.weight"].numel()  # looked up
    queries = torch.empty(sizes.num_attention_heads, sizes.seq_length, sizes.head_width, device="meta")
    with FlopCounterMode(display=False) as counter:
        (queries @ queries.mT) @ queries
    full_attention_per_token = sizes.num_layers * counter.get_total_flops() // sizes.seq_length
    expected = 6 * parameters + 3 * full_attention_per_token // 2
    assert training_flops_per_token(sizes, vocab_size) == expected


def test_mfu_is_the_share_of_the_peak_and_says_where_it_comes_from() -> None:
    share = mfu(1e5, 5 * 10**9, "NVIDIA A100-SXM4-80GB", 4)
    assert share == pytest.approx(1e5 * 5e9 / (4 * 312e12))
    statement = mfu_statement(1e5, 5 * 10**9, "NVIDIA A100-SXM4-80GB", 4)
    assert statement.startswith("MFU 40.1% = 100,000 tokens/s * 5 GFLOP/token / (4 * 312 TFLOP/s")


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_an_unknown_device_has_no_peak_and_is_named(name: str) -> None:
    assert device_peak_tflops(name) is None and mfu(1.0, 1, name, 1) is None
    assert name in mfu_statement(1.0, 1, name, 1)
