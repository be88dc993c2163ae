"""Each map against the network that it should compute, by independent means."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from model.transformer import Transformer
from tests.train.initial.made import VOCAB_SIZE, FixedNorm, config, logits, source, tokens
from train.initial.calibration import measure
from train.initial.conversion import LayerMeasure, convert, faults_between, needs_data
from train.initial.source import fill

EXACT = {
    "nothing": ({}, {}),
    "a linear FFN is fused": ({"architecture": "SM+LN"}, {"fused_ffn": True}),
    "and scaled": ({"architecture": "SM+LN"}, {"fused_ffn": True, "scaled_ffn": True}),
    "scaled before": ({"architecture": "SM+ScFFN"}, {"fused_ffn": True}),
    "scaled in two": ({}, {"scaled_ffn": True}),
    "a temperature": ({}, {"temperature": "per_position"}),
    "a raw one": ({}, {"temperature": "per_head", "temperature_form": "raw"}),
    "calibrated": ({"temperature": "per_head"}, {"temperature": "per_position", "temperature_init": 0.3}),
    "an untied head": ({}, {"tied_head": False}),
    "places for biases": ({"biases": "query_key"}, {"biases": "all"}),
}


@pytest.mark.parametrize("name", EXACT)
def test_maps_that_are_exact(name: str) -> None:
    before, change = EXACT[name]
    made = source(config(**{"architecture": "SM+LN+G", "biases": "all", **before}))
    target = dataclasses.replace(made.model, **change)
    assert not needs_data(made.model, target)
    converted = convert(made, target, VOCAB_SIZE, 0, [])
    expected = logits(made.model, made.weights, tokens())
    assert (logits(target, converted.weights, tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not converted.left_out


@pytest.mark.parametrize("architecture", ["SM+ScFFN", "SM+ScFuFFN"])
def test_an_ffn_that_is_no_longer_scaled_keeps_its_alpha_and_loses_its_beta(architecture: str) -> None:
    made = source(config(architecture, biases="all"))
    for layer in ("0", "1"):
        made.weights[f"layers.{layer}.ffn.beta"].fill_(1.0)
    target = dataclasses.replace(made.model, scaled_ffn=False)
    converted = convert(made, target, VOCAB_SIZE, 0, [])
    expected = logits(made.model, made.weights, tokens())
    assert (logits(target, converted.weights, tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert converted.left_out == ("ffn.beta",)


SCALES = [LayerMeasure(0.7, 1.3), LayerMeasure(1.9, 0.4)]
FOLDS = {
    "two matrices": {},
    "with a temperature": {"temperature": "per_head"},
    "with a calibrated raw one": {"temperature": "per_position", "temperature_form": "raw", "activation": "relu"},
    "fused and scaled": {"activation": "identity", "fused_ffn": True, "scaled_ffn": True},
    "deep enough that alpha is not 1": {"activation": "identity", "scaled_ffn": True, "num_layers": 14},
    "the same, fused": {"activation": "identity", "fused_ffn": True, "scaled_ffn": True, "num_layers": 14},
    "rotary positions, whose key bias acts": {"positions": "rotary"},
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_norm_is_folded_as_one_with_a_fixed_scale(name: str) -> None:
    change = FOLDS[name]
    sizes = {key: value for key, value in change.items() if key in ("num_layers", "positions", "activation")}
    made = source(config("SM+LN+G", biases="all", **sizes))
    target = dataclasses.replace(made.model, **change, norm="none")
    measured = [SCALES[layer % 2] for layer in range(target.num_layers)]
    converted = convert(made, target, VOCAB_SIZE, 0, measured)

    def fix(transformer: Transformer) -> None:
        for block, scales in zip(transformer.layers.values(), measured, strict=True):
            block.attention_norm = FixedNorm(block.attention_norm, scales.attention_scale)
            block.ffn_norm = FixedNorm(block.ffn_norm, scales.ffn_scale)

    expected = logits(made.model, made.weights, tokens(), fix)
    assert (logits(target, converted.weights, tokens()) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not converted.left_out and not converted.anew


def test_a_temperature_takes_the_scale_of_a_norm() -> None:
    made = source(config("SM+LN+G", biases="all"))
    target = dataclasses.replace(made.model, norm="none", temperature="per_head", temperature_init=0.1)
    weights = convert(made, target, VOCAB_SIZE, 0, SCALES).weights
    stored = weights["layers.1.attention.temperature_parameter"]
    assert torch.allclose(0.1 * stored.exp(), torch.full((4,), 1.9**2))


def test_what_a_pass_measures() -> None:
    """Scales against the definition; the linear map against a least squares solver on the very inputs and outputs."""
    made = source(config("SM+LN+G", biases="all"))
    batches = [tokens(24), (tokens(24) + 7) % VOCAB_SIZE]
    measured = measure(made, batches, torch.device("cpu"))
    seen: dict[str, list[torch.Tensor]] = {"norm": [], "x": [], "y": []}

    def watch(transformer: Transformer) -> None:
        block = transformer.layers["1"]
        block.ffn_norm.register_forward_hook(lambda m, i, o: seen["norm"].append(i[0]))
        block.ffn_norm.register_forward_hook(lambda m, i, o: seen["x"].append(o))
        block.ffn.down.register_forward_hook(lambda m, i, o: seen["y"].append(o))

    for batch in batches:
        logits(made.model, made.weights, batch, watch)
    norm, x, y = (torch.cat(seen[key], dim=1).flatten(0, 1) for key in ("norm", "x", "y"))
    inverse = 1 / (norm.var(dim=-1, correction=0) + 1e-5).sqrt()
    assert measured[1].ffn_scale == pytest.approx(1 / inverse.mean().item(), rel=1e-5)
    with_one = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    fitted = with_one @ torch.linalg.lstsq(with_one, y, driver="gelsd").solution
    matrix, constant = measured[1].ffn_matrix, measured[1].ffn_constant
    assert matrix is not None and constant is not None
    assert (x @ matrix.T + constant - fitted).abs().max() < 1e-3 * fitted.abs().max()


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"fused_ffn": True}),
        ({}, {}),
        ({}, {"fused_ffn": True, "scaled_ffn": True}),
        ({"scaled_ffn": True}, {}),
        ({"scaled_ffn": True}, {"fused_ffn": True}),
    ],
)
def test_an_ffn_becomes_its_linear_map(before: dict[str, Any], change: dict[str, Any]) -> None:
    made = source(config("SM+LN+G", biases="all", **before))
    target = dataclasses.replace(made.model, activation="identity", **change)
    measured = measure(made, [tokens(64)], torch.device("cpu"))
    converted = convert(made, target, VOCAB_SIZE, 0, measured)

    def replace(transformer: Transformer) -> None:
        for block, layer in zip(transformer.layers.values(), measured, strict=True):
            block.ffn.up.register_forward_hook(lambda module, inputs, output, block=block: _keep(block, inputs[0]))
            block.ffn.down = _Affine(block, layer)

    expected = logits(made.model, made.weights, tokens(), replace)
    assert (logits(target, converted.weights, tokens()) - expected).abs().max() < 1e-4 * expected.abs().max()


def _keep(block: Any, x: torch.Tensor) -> None:
    block.seen = x


class _Affine(nn.Module):
    def __init__(self, block: Any, layer: LayerMeasure) -> None:
        super().__init__()
        self.block, self.layer = [block], layer

    def forward(self, x_TBF: torch.Tensor, divisor: Any = None) -> torch.Tensor:
        assert self.layer.ffn_matrix is not None
        return self.block[0].seen @ self.layer.ffn_matrix.T + self.layer.ffn_constant


def test_what_is_lost_and_what_is_new_are_named() -> None:
    made = source(config("SM+LN+G", biases="all"), left_out=("score.weight",))
    target = config("EReg(SM(t)+ScFuFFN)", seq_length=8)
    converted = convert(made, target, VOCAB_SIZE, 0, measure(made, [tokens()], torch.device("cpu")))
    assert converted.anew == ("attention.threshold",)
    assert converted.left_out == ("attention.output_bias", "ffn.bias", "score.weight")
    assert "model.norm: layernorm -> none" in converted.changes and "model.seq_length: 16 -> 8" in converted.changes
    assert converted.weights["embedding.position.weight"].shape == (8, 32)


def test_a_padded_vocabulary_loses_its_padding() -> None:
    made = source(config("SM+LN+G"))
    converted = convert(made, made.model, VOCAB_SIZE - 3, 0, [])
    assert torch.equal(converted.weights["embedding.word.weight"], made.weights["embedding.word.weight"][:-3])


@pytest.mark.parametrize(
    ("here", "change", "vocab_size", "fault"),
    [
        ({}, {"num_layers": 3}, 50, "model.num_layers is 2 there and 3 here; set model.num_layers=2"),
        ({}, {"seq_length": 32}, 50, "model.seq_length is 16 there and 32 here; set model.seq_length to at most 16"),
        ({}, {"ffn_hidden_size": 64}, 50, "model.ffn_hidden_size is 128 there and 64 here"),
        ({}, {}, 51, "the vocabulary has 50 tokens there, and the dataset's tokenizer has 51"),
        ({"norm": "none"}, {"norm": "layernorm"}, 50, "no map adds a norm"),
        ({"activation": "identity", "fused_ffn": True}, {"fused_ffn": False}, 50, "one matrix is not two"),
        ({}, {"weight_norm": "FFN"}, 50, "model.weight_norm is 'none' there and 'FFN' here; keep 'none'"),
        ({"weight_norm": "FFN"}, {"norm": "none"}, 50, "keeps its norms and its FFN"),
    ],
)
def test_what_cannot_be_converted(here: dict[str, Any], change: dict[str, Any], vocab_size: int, fault: str) -> None:
    made = source(config("SM+LN+G", **here))
    assert fault in "\n".join(faults_between(made, dataclasses.replace(made.model, **change), vocab_size))
    assert not faults_between(made, made.model, 50)


def test_spectral_norms_begin_with_the_weights_that_are_read() -> None:
    made = source(config("SM", spectral_norm="QK+FFN"))
    model = Transformer(made.model, VOCAB_SIZE)
    fill(model, made.weights.items())
    for name in ("attention.query_key_value", "ffn.up", "ffn.down"):
        (normalization,), weight = _spectral_norm(model.layers["1"].get_submodule(name))
        expected = torch.linalg.matrix_norm(normalization.matrices(weight), 2)
        torch.testing.assert_close(normalization.sigma(weight), expected, rtol=0.02, atol=0)


def _spectral_norm(linear: Any) -> tuple[Any, Any]:
    return linear.parametrizations["weight"], linear.parametrizations["weight"].original
