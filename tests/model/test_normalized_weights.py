"""Weight and spectral normalization against norms and singular values that torch.linalg computes."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.normalized_weights import update_spectral_norms
from model.transformer import Transformer
from tests.model.comparison import SEQUENCES, build, random_batch
from tests.model.reference import PLACEMENTS, Sizes

CONFIG = ModelConfig(architecture="SM+SN", num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=8).resolved()


def effective_matrices(model: Transformer, layer: int) -> dict[str, Tensor]:
    """The matrices that a layer multiplies by, query, key and value taken apart."""
    block = model.layers[str(layer)]
    heads = block.attention.query_bias.shape[0]
    stacked = block.attention.query_key_value.weight.unflatten(0, (heads, 3, -1))
    matrices = {letter: stacked[:, slot].flatten(0, 1) for slot, letter in enumerate("QKV")}
    matrices |= {"O": block.attention.output.weight, "up": block.ffn.up.weight, "down": block.ffn.down.weight}
    return {name: matrix.detach() for name, matrix in matrices.items()}


def touched_by(placement: str) -> set[str]:
    return {letter for letter in placement.split("+")[0] if letter in "QKVO"} | (
        {"up", "down"} if placement.endswith("FFN") else set()
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_spectral_norm_is_one_exactly_where_placed(placement: str) -> None:
    model = build(ModelConfig(architecture="SM+SN", spectral_norm=placement), Sizes())
    for name, matrix in effective_matrices(model, 1).items():
        largest = float(torch.linalg.svdvals(matrix)[0])
        if name in touched_by(placement):
            assert largest == pytest.approx(1.0, rel=1e-10), name
        else:
            assert abs(largest - 1) > 1e-3, name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_row_norms_are_the_gains_exactly_where_placed(placement: str) -> None:
    model = build(ModelConfig(architecture="SM+WN", weight_norm=placement), Sizes())
    block = model.layers["1"]
    gains = {}
    if hasattr(block.attention.query_key_value, "parametrizations"):
        stacked = block.attention.query_key_value.parametrizations.weight[0].gain.detach().unflatten(0, (4, 3, 4))
        gains = {letter: stacked[:, slot].flatten() for slot, letter in enumerate("QKV")}
    for name, linear in {"O": block.attention.output, "up": block.ffn.up, "down": block.ffn.down}.items():
        if hasattr(linear, "parametrizations"):
            gains[name] = linear.parametrizations.weight[0].gain.detach()
    for name, matrix in effective_matrices(model, 1).items():
        norms = torch.linalg.vector_norm(matrix, dim=1)
        if name in touched_by(placement):
            torch.testing.assert_close(norms, gains[name].abs(), rtol=1e-12, atol=0)
        elif name in gains:
            assert not torch.allclose(norms, gains[name].abs(), rtol=1e-2), name


def test_initialization_converges_well_enough_to_start() -> None:
    """At the start sigma is within a few percent, from below: power iteration never overestimates."""
    model = Transformer(CONFIG, 50, seed=1)
    for name in ("up", "down"):
        largest = float(torch.linalg.svdvals(effective_matrices(model, 0)[name])[0])
        assert 1 - 1e-6 <= largest < 1.05


def test_training_steps_carry_the_iteration_on() -> None:
    model = Transformer(CONFIG, 50, seed=1)
    update_spectral_norms(model, 2000)
    linear = model.layers["0"].ffn.up
    sigma = linear.parametrizations.weight[0].sigma(linear.parametrizations.weight.original)
    expected = torch.linalg.svdvals(linear.parametrizations.weight.original.detach())[:1]
    torch.testing.assert_close(sigma.detach(), expected, rtol=1e-5, atol=0)


def test_only_update_spectral_norms_moves_the_vectors() -> None:
    """Forward and backward passes, in training or evaluation, must see one sigma: recomputation depends on it."""
    model = Transformer(CONFIG, 29, seed=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    tokens_BT, labels_BT = random_batch(dataclasses.replace(Sizes(), context=8), 8)
    for mode in (True, False):
        model.train(mode)
        model(tokens_BT.T, labels_BT.T)[0].backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    update_spectral_norms(model)
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(before[name], buffer)]
    assert set(moved) == set(before)


@pytest.mark.parametrize("architecture", ["SM+WN", "SM+SN"])
def test_normalized_weights_ignore_the_scale_of_what_is_stored(architecture: str) -> None:
    model = build(ModelConfig(architecture=architecture), Sizes())
    tokens_BT, _ = random_batch(Sizes(), 12)
    expected, _ = model(tokens_BT.T)
    with torch.no_grad():
        model.layers["0"].ffn.up.parametrizations.weight.original.mul_(3.0)
    update_spectral_norms(model)
    actual, _ = model(tokens_BT.T)
    assert actual.shape == (12, SEQUENCES, 29)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
