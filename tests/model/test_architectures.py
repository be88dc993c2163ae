"""Every architecture and ingredient against the reference: loss, logits, entropies and all gradients in float64."""

import dataclasses
import math

import pytest
import torch
from torch.nn.utils import parametrize

from model.config import ARCHITECTURES, NORMALIZED_PLACEMENTS, ModelConfig
from model.initialize import named_parameters
from tests.model.comparison import REGULARIZER, assert_same, build, compare, random_batch, run_model, run_reference
from tests.model.reference import PLACEMENTS, RECIPES, Recipe, Sizes

FULL = "EReg(SM(t)+ScFuFFN)"


def test_the_table_holds_the_published_names_and_placements() -> None:
    assert set(ARCHITECTURES) == set(RECIPES)
    assert set(NORMALIZED_PLACEMENTS) == {"none", *PLACEMENTS}


@pytest.mark.parametrize("name", RECIPES)
def test_published_architecture(name: str) -> None:
    compare(ModelConfig(architecture=name), RECIPES[name])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weight_normalization_at_every_placement(placement: str) -> None:
    config = ModelConfig(architecture="SM+WN", weight_norm=placement)
    compare(config, dataclasses.replace(RECIPES["SM+WN"], weight_normalized=placement))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_spectral_normalization_at_every_placement(placement: str) -> None:
    config = ModelConfig(architecture="SM+SN", spectral_norm=placement)
    compare(config, dataclasses.replace(RECIPES["SM+SN"], spectrally_normalized=placement))


@pytest.mark.parametrize("placement", ["QK", "QKVO+FFN"])
def test_a_learned_gain_of_spectrally_normalized_matrices(placement: str) -> None:
    """W = gamma V / sigma(V), one gamma for queries, one for keys and so on; sigma from the singular values."""
    config = ModelConfig(architecture="SM+SN", spectral_norm=placement, spectral_gain=True, temperature="per_head")
    recipe = Recipe(spectrally_normalized=placement, spectral_gain=True, temperature="per_head")
    compare(config, recipe)


@pytest.mark.parametrize("form", ["exp", "raw"])
@pytest.mark.parametrize("temperature", ["none", "per_head", "per_position"])
def test_temperature(temperature: str, form: str) -> None:
    recipe = dataclasses.replace(RECIPES[FULL], temperature=temperature, raw_temperature=form == "raw")
    compare(ModelConfig(temperature=temperature, temperature_form=form), recipe)


INGREDIENTS = {
    "fused alone": (dict(fused_ffn=True), Recipe(fused=True)),
    "scaled with an activation": (dict(scaled_ffn=True, activation="gelu"), Recipe(scaled=True, activation="gelu")),
    "norm alone": (dict(norm="layernorm"), Recipe(layer_norm=True)),
    "relu alone": (dict(activation="relu"), Recipe(activation="relu")),
    "GPT-2": (
        dict(norm="layernorm", activation="gelu_tanh", biases="all"),
        Recipe(layer_norm=True, activation="gelu_tanh", all_biases=True),
    ),
    "all biases of a scaled fused FFN": (
        dict(fused_ffn=True, scaled_ffn=True, biases="all"),
        Recipe(fused=True, scaled=True, all_biases=True),
    ),
    "temperature alone": (dict(temperature="per_position"), Recipe(temperature="per_position")),
    "regularizer alone": (dict(regularized=True), Recipe(regularized=True)),
    "no final norm": (dict(final_norm=False), Recipe(final_norm=False)),
    "untied head": (dict(tied_head=False), Recipe(tied=False)),
    "rotary positions": (dict(positions="rotary"), Recipe(rotary=True)),
    "normalized fused FFN": (
        dict(fused_ffn=True, weight_norm="QKVO+FFN"),
        Recipe(fused=True, weight_normalized="QKVO+FFN"),
    ),
    "scaled and normalized fused FFN": (
        dict(fused_ffn=True, scaled_ffn=True, spectral_norm="FFN"),
        Recipe(fused=True, scaled=True, spectrally_normalized="FFN"),
    ),
    "scaled fused FFN after a norm": (
        dict(fused_ffn=True, scaled_ffn=True, norm="layernorm"),
        Recipe(fused=True, scaled=True, layer_norm=True),
    ),
    "everything": (
        dict(
            norm="layernorm", fused_ffn=True, scaled_ffn=True, temperature="per_head", temperature_form="raw",
            regularized=True, tied_head=False, positions="rotary", spectral_norm="QKV+FFN",
        ),
        Recipe(
            layer_norm=True, fused=True, scaled=True, temperature="per_head", raw_temperature=True,
            regularized=True, tied=False, rotary=True, spectrally_normalized="QKV+FFN",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INGREDIENTS)
def test_ingredient_by_itself(name: str) -> None:
    keys, recipe = INGREDIENTS[name]
    compare(ModelConfig(architecture="SM", **keys), recipe)


SIZES = {
    "odd": Sizes(layers=2, width=15, heads=3, context=7, ffn_width=11, vocabulary=13, padded_vocabulary=13),
    "one layer, one head": Sizes(layers=1, width=6, heads=1, context=5, ffn_width=9, vocabulary=3, padded_vocabulary=3),
    "heads one wide": Sizes(layers=2, width=5, heads=5, context=6, ffn_width=8, vocabulary=10, padded_vocabulary=10),
    "one token": Sizes(layers=2, width=8, heads=2, context=1, ffn_width=8, vocabulary=10, padded_vocabulary=10),
    "padded vocabulary": Sizes(vocabulary=29, padded_vocabulary=128),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("architecture", [FULL, "SM+LN+G"])
def test_sizes(architecture: str, name: str) -> None:
    compare(ModelConfig(architecture=architecture), RECIPES[architecture], SIZES[name])


@pytest.mark.parametrize("architecture", [FULL, "SM+LN+G"])
def test_sequence_shorter_than_the_context(architecture: str) -> None:
    compare(ModelConfig(architecture=architecture), RECIPES[architecture], tokens=7)


@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_regularizer_of_a_whole_model(granularity: str, margin: float) -> None:
    regularizer = dataclasses.replace(REGULARIZER, granularity=granularity, margin=margin)
    result = compare(ModelConfig(), RECIPES[FULL], regularizer=regularizer)
    assert result.loss > result.cross_entropy, "the penalty is not exercised"


def test_comparison_notices_a_changed_gradient() -> None:
    """The net itself: a scale on one row of one gradient, invisible in the loss, must not pass."""
    model, sizes = build(ModelConfig(), Sizes()), Sizes()
    batch = random_batch(sizes, sizes.context)
    expected = run_reference(model, RECIPES[FULL], sizes, *batch, REGULARIZER)
    handle = model.layers["1"].attention.threshold.register_hook(lambda gradient: gradient * (1 + 1e-8))
    with pytest.raises(AssertionError, match=r"layers\.1\.attention\.threshold"):
        assert_same(run_model(model, *batch, REGULARIZER), expected)
    handle.remove()
    assert_same(run_model(model, *batch, REGULARIZER), expected)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_key_bias_learns_only_where_positions_rotate_it(positions: str) -> None:
    """The softmax does not see it otherwise: a gradient of rounding errors would still make Adam take whole steps."""
    sizes = Sizes()
    model = build(ModelConfig(positions=positions), sizes).float()
    gradients = run_model(model, *random_batch(sizes, sizes.context), REGULARIZER).gradients
    learns = [bool(gradient.any()) for name, gradient in gradients.items() if name.endswith("key_bias")]
    assert learns == [positions == "rotary"] * sizes.layers


def test_padded_rows_neither_act_nor_learn() -> None:
    sizes = Sizes(vocabulary=29, padded_vocabulary=128)
    model = build(ModelConfig(), sizes)
    batch = random_batch(sizes, sizes.context)
    before = run_model(model, *batch, REGULARIZER)
    with torch.no_grad():
        model.embedding.word.weight[29:] = 50.0
    after = run_model(model, *batch, REGULARIZER)
    assert_same(after, before)
    assert after.logits_BTV.shape[-1] == 29
    assert torch.count_nonzero(after.gradients["embedding.word.weight"][29:]) == 0


def test_two_stages_compose_to_the_whole_model() -> None:
    whole = build(ModelConfig(), Sizes())
    first = type(whole)(whole.config, 29, layers=range(2), last=False).double()
    second = type(whole)(whole.config, 29, layers=range(2, 3), first=False).double()
    values = dict(named_parameters(whole))
    with torch.no_grad():
        for stage in (first, second):
            for name, parameter in named_parameters(stage):
                source = "embedding.word.weight" if name == "head.weight" else name
                parameter.copy_(values[source])
    tokens_BT, labels_BT = random_batch(Sizes(), 12)
    hidden_TBD, entropies_first = first.hidden_states(tokens_BT.T)
    loss, entropies_second = second(hidden_TBD, labels_BT.T)
    expected_loss, expected_entropies = whole(tokens_BT.T, labels_BT.T)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    torch.testing.assert_close(entropies_first + entropies_second, expected_entropies, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="holds its head"):
        first(tokens_BT.T)


@pytest.mark.parametrize("architecture", [FULL, "SM+LN+G"])
def test_first_row_has_no_entropy(architecture: str) -> None:
    model = build(ModelConfig(architecture=architecture), Sizes())
    _, entropies_BNT = model(random_batch(Sizes(), 12)[0].T)
    for entropy_BNT in entropies_BNT:
        assert torch.count_nonzero(entropy_BNT[:, :, 0]) == 0
        assert bool((entropy_BNT[:, :, 1:] > 0).all())


@pytest.mark.parametrize("context", [12, 128])
def test_uniform_attention_reaches_the_causal_maximum(context: int) -> None:
    """The largest mean entropy is ln(T!)/T, not ln T: row i sees i keys."""
    sizes = Sizes(context=context)
    model = build(ModelConfig(architecture="SM"), sizes)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.attention.query_key_value.weight.zero_()
            layer.attention.query_bias.zero_()
    _, entropies_BNT = model(random_batch(sizes, context)[0].T)
    largest = math.lgamma(context + 1) / context
    assert {12: 1.666, 128: 3.878}[context] == pytest.approx(largest, abs=5e-4)
    for entropy_BNT in entropies_BNT:
        torch.testing.assert_close(entropy_BNT.mean(-1), torch.full((3, 4), largest, dtype=torch.float64))


def test_only_normalized_linears_are_reparametrized() -> None:
    model = build(ModelConfig(architecture="SM+WN", weight_norm="QK"), Sizes())
    block = model.layers["0"]
    assert parametrize.is_parametrized(block.attention.query_key_value)
    assert not any(parametrize.is_parametrized(block.get_submodule(name)) for name in ("ffn.up", "ffn.down"))
