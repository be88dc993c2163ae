"""Initial values depend on the seed and a parameter's name alone: never on stages, shards, padding or depth."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.initialize import generator, initial_temperature, initial_value, named_parameters
from model.transformer import Transformer, global_shapes
from tests.model.comparison import random_batch
from tests.model.reference import RECIPES, Sizes, expected_shapes

SIZES = Sizes()
CONFIG = ModelConfig(num_layers=3, hidden_size=16, num_attention_heads=4, seq_length=12).resolved()
VOCAB = 29


def values(config: ModelConfig = CONFIG, seed: int = 1, **parts: object) -> dict[str, torch.Tensor]:
    model = Transformer(config, VOCAB, **parts, seed=seed)
    return {name: parameter.detach() for name, parameter in named_parameters(model)}


def test_a_model_is_ready_when_it_is_built() -> None:
    """What a user types first: without `resolved` or `initialize`."""
    unresolved = ModelConfig(num_layers=3, hidden_size=16, num_attention_heads=4, seq_length=12)
    model = Transformer(unresolved, VOCAB)
    assert model.config == CONFIG
    for name, value in values().items():
        assert torch.equal(dict(named_parameters(model))[name], value), name


def test_a_model_without_memory_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.transformer.initialize", lambda *_: pytest.fail("values for no memory"))
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in Transformer(CONFIG, VOCAB).parameters())


def test_a_faulty_configuration_builds_no_model() -> None:
    with pytest.raises(ValueError, match=r"model.hidden_size = 15 is not a multiple of model.num_attention_heads = 4"):
        Transformer(dataclasses.replace(CONFIG, hidden_size=15), VOCAB)
    with pytest.raises(ValueError, match="EReg"):
        Transformer(ModelConfig(architecture="EReg"), VOCAB)


def is_drawn(name: str) -> bool:
    return not name.endswith(("temperature_parameter", "bias"))


STAGES = {
    "first of three": dict(layers=range(1), last=False),
    "middle": dict(layers=range(1, 2), first=False, last=False),
    "last": dict(layers=range(2, 3), first=False),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_with_the_values_of_the_whole_model(stage: str, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tied_head=tied)
    whole = values(config)
    held = values(config, **STAGES[stage])
    assert held
    for name, value in held.items():
        source = "embedding.word.weight" if tied and name == "head.weight" else name
        assert torch.equal(value, whole[source]), name


def test_a_deeper_model_and_other_ingredients_share_what_they_share() -> None:
    deep = values(dataclasses.replace(CONFIG, num_layers=5))
    plain = values(dataclasses.replace(CONFIG, temperature="none", regularized=False))
    for name, value in values().items():
        assert torch.equal(deep[name], value)
        assert name not in plain or torch.equal(plain[name], value)


def test_nothing_around_a_parameter_changes_it() -> None:
    """Neither torch's global generator nor a model built before."""
    torch.manual_seed(5)
    once = values()
    torch.randn(100)
    again = values()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_seeds_and_names_differ() -> None:
    one, two = values(seed=1), values(seed=2)
    matrices = [name for name, value in one.items() if value.dim() == 2 and is_drawn(name)]
    assert len(matrices) == 2 + 3 * 3
    assert all(not torch.equal(one[name], two[name]) for name in matrices)
    starts = {tuple(one[name].flatten()[:4].tolist()) for name in matrices}
    assert len(starts) == len(matrices), "two parameters share their random numbers"


def test_generators_are_independent_of_how_seed_and_name_are_spelled_together() -> None:
    assert generator(1, "1/x").initial_seed() != generator(11, "x").initial_seed()
    assert generator(1, "a").initial_seed() == generator(1, "a").initial_seed()


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_matrices_have_the_configured_standard_deviation(std: float) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, ffn_hidden_size=None, init_std=std, fused_ffn=False).resolved()
    for name, value in values(config).items():
        if value.dim() == 2 and is_drawn(name):
            error = 5 / math.sqrt(value.numel())
            assert abs(float(value.mean())) < std * error, name
            assert float(value.std()) == pytest.approx(std, rel=error), name


def test_the_scale_of_query_and_key_multiplies_no_other_matrix() -> None:
    plain, scaled = values(CONFIG), values(dataclasses.replace(CONFIG, query_key_init_scale=3.0))
    for name, value in plain.items():
        expected = value.clone()
        if name.endswith("query_key_value.weight"):
            for head in range(CONFIG.num_attention_heads):
                first = 3 * head * CONFIG.head_width
                expected[first : first + 2 * CONFIG.head_width] *= 3.0
        torch.testing.assert_close(scaled[name], expected, rtol=0, atol=0, msg=name)


def test_scalars_and_vectors_start_as_the_method_says() -> None:
    config = dataclasses.replace(CONFIG, norm="layernorm", temperature_init=0.1, threshold_init=0.4)
    start = {
        "alpha": 1.0,
        "beta": 1.0,
        "threshold": 0.4,
        "temperature_parameter": 0.0,
        "query_bias": 0.0,
        "key_bias": 0.0,
        "norm.weight": 1.0,
        "norm.bias": 0.0,
    }
    seen = set()
    for name, value in values(config).items():
        for ending, expected in start.items():
            if name.endswith(ending):
                seen.add(ending)
                assert bool((value == torch.tensor(expected)).all()), name
    assert seen == set(start)
    raw = values(dataclasses.replace(config, temperature_form="raw"))
    assert bool((raw["layers.0.attention.temperature_parameter"] == torch.tensor(0.1)).all())


@pytest.mark.parametrize("placement", ["QK", "FFN", "QKVO+FFN"])
def test_gains_start_as_the_row_norms(placement: str) -> None:
    """So that a weight-normalized network starts as the plain one: W = V."""
    config = dataclasses.replace(CONFIG, fused_ffn=False, weight_norm=placement, ffn_hidden_size=40)
    plain = Transformer(dataclasses.replace(config, weight_norm="none"), VOCAB)
    normalized = Transformer(config, VOCAB)
    tensors = dict(named_parameters(normalized))
    gains = [name for name in tensors if name.endswith("gain")]
    assert gains
    for name in gains:
        weight = tensors[name.removesuffix("gain") + "weight"]
        torch.testing.assert_close(tensors[name], torch.linalg.vector_norm(weight, dim=1), rtol=1e-6, atol=0)
    for linear in ("attention.query_key_value", "attention.output", "ffn.up", "ffn.down"):
        effective = normalized.layers["1"].get_submodule(linear).weight
        torch.testing.assert_close(effective, plain.layers["1"].get_submodule(linear).weight, rtol=1e-6, atol=1e-8)


def test_padding_is_zero_and_the_rest_unpadded() -> None:
    padded, unpadded = values(padded_vocab_size=128), values()
    assert torch.count_nonzero(padded["embedding.word.weight"][VOCAB:]) == 0
    assert torch.equal(padded["embedding.word.weight"][:VOCAB], unpadded["embedding.word.weight"])


def test_padding_never_wins_probability() -> None:
    """Zero logits would beat negative ones: the last layer's output is turned against every real token."""
    model = Transformer(CONFIG, VOCAB, padded_vocab_size=128, seed=1)
    with torch.no_grad():
        model.embedding.word.weight[:VOCAB] = -1.0
        model.head.norm.weight.zero_()
        model.head.norm.bias.fill_(1.0)
    tokens_BT, labels_BT = random_batch(SIZES, 12)
    logits_TBV, _ = model(tokens_BT.T)
    assert logits_TBV.shape[-1] == VOCAB
    loss, _ = model(tokens_BT.T, labels_BT.T)
    assert loss.item() / labels_BT.numel() == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_a_shard_is_a_cut_of_the_whole() -> None:
    """Halving the vocabulary through `cut` gives the two halves, and names reach `cut` as the whole model's."""
    whole, seen = values(), []
    with torch.device("meta"):
        model = Transformer(CONFIG, VOCAB, padded_vocab_size=20)
    model.to_empty(device="cpu")
    model.tie_head()

    def second_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor[20:] if name == "embedding.word.weight" else tensor

    model.initialize(1, second_half)
    held = model.embedding.word.weight
    assert torch.equal(held[:9], whole["embedding.word.weight"][20:])
    assert torch.count_nonzero(held[9:]) == 0
    assert sorted(seen) == sorted(whole)  # several threads draw values


@pytest.mark.parametrize("architecture", RECIPES)
def test_global_shapes_are_those_of_the_method(architecture: str) -> None:
    config = dataclasses.replace(ModelConfig(architecture=architecture), num_layers=3, hidden_size=16)
    config = dataclasses.replace(config, num_attention_heads=4, seq_length=12).resolved()
    shapes = {name: tuple(shape) for name, shape in global_shapes(config, VOCAB).items()}
    assert shapes == expected_shapes(RECIPES[architecture], SIZES)


def test_initial_loss_is_that_of_a_guess() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=4)
    model = Transformer(config, VOCAB, seed=1)
    tokens_BT, labels_BT = random_batch(SIZES, 12)
    logits_TBV, _ = model(tokens_BT.T)
    loss = F.cross_entropy(logits_TBV.flatten(0, 1), labels_BT.T.flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=0.05)


def growth(config: ModelConfig) -> float:
    """Mean square of the residual after the blocks over that before them, on random tokens."""
    model = Transformer(config, VOCAB, seed=1)
    tokens = torch.randint(VOCAB, (config.seq_length, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = model.embedding(tokens)
        return (model.hidden_states(tokens)[0].square().mean() / x.square().mean()).item()


def sized(**sizes: object) -> ModelConfig:
    return ModelConfig(**{"num_attention_heads": 4, "seq_length": 16, **sizes}).resolved()


@pytest.mark.parametrize(
    "sizes", [{"num_layers": 3, "hidden_size": 1536}, {"num_layers": 48, "hidden_size": 64, "init_std": 0.0693}]
)
@pytest.mark.parametrize("architecture", ["EReg(SM(t)+ScFuFFN)", "SM"])
def test_wider_and_deeper_residuals_grow_as_at_the_papers_size(sizes: dict, architecture: str) -> None:
    """1 + D std^2 a block at 12 x 768 is 1.31, 25 over 12 blocks; D std^2 is 0.307 at width 64 and std 0.0693 too."""
    layers = sizes["num_layers"]
    scaled = growth(sized(architecture=architecture, **sizes))
    assert scaled < 1.8 ** min(layers, 12), "at most what 12 of the paper's blocks would do"
    assert growth(sized(architecture=architecture, initialization="paper", **sizes)) > 2 * scaled


def test_scaled_is_the_papers_initialization_up_to_its_size_and_with_norms() -> None:
    small = sized(num_layers=12, hidden_size=64)
    deep_with_norms = sized(num_layers=14, hidden_size=64, architecture="SM+LN+G")
    for config in (small, deep_with_norms):
        paper = values(dataclasses.replace(config, initialization="paper"))
        for name, value in values(config).items():
            assert torch.equal(value, paper[name]), name
    deep = values(sized(num_layers=24, hidden_size=64))
    assert deep["layers.0.ffn.alpha"].item() == 2.0 and deep["layers.0.ffn.beta"].item() == 1.0
    assert deep["layers.0.attention.output.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert deep["layers.0.ffn.fused.weight"].std().item() == pytest.approx(0.02, rel=0.05), "alpha divides it already"


def test_a_wide_tied_head_does_not_start_by_repeating_its_input() -> None:
    """Random tokens start near ln V; with the paper's deviation the input token has a logit of many nats."""
    losses = {}
    for initialization in ("scaled", "paper"):
        config = sized(num_layers=1, hidden_size=6144, initialization=initialization)
        model = Transformer(config, VOCAB, seed=1)
        tokens, labels = torch.randint(VOCAB, (2, config.seq_length, 4), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            losses[initialization] = (model(tokens, labels)[0] / labels.numel()).item() - math.log(VOCAB)
    assert losses["paper"] > 3 * losses["scaled"]


def test_bf16_resolves_small_changes_of_a_temperature() -> None:
    """A parameter of ln t itself would move in steps of 1.6% at t = 0.01."""
    model = Transformer(CONFIG, VOCAB, seed=1)
    attention = model.layers["0"].attention
    for change in (0.001, -0.004, 0.05):
        attention.temperature_parameter.data.fill_(change)
        t = attention.bfloat16().temperature()
        torch.testing.assert_close(t, torch.full_like(t, 0.01 * math.exp(change)), rtol=2e-4, atol=0)


CALIBRATED = {
    "fused": {"init_std": 0.0346},  # D std^2 is 0.307, as at width 768
    "deeper than the paper's": {"init_std": 0.0346, "num_layers": 24},
    "wider than the paper's": {"hidden_size": 1536, "num_layers": 4},
    "two matrices, rotary": {"architecture": "SM+ScFFN", "init_std": 0.03, "positions": "rotary"},
    "ReLU": {"architecture": "EReg(SM(t)+R)", "init_std": 0.0346, "num_layers": 6},
    "spectral norm of QK": {"init_std": 0.0346, "spectral_norm": "QK", "spectral_gain": True},
    "norms": {"architecture": "SM+LN+G"},
}


@pytest.mark.parametrize("case", CALIBRATED)
def test_calibrated_temperatures_are_the_mean_square_of_what_layers_read(case: str) -> None:
    sizes = {"num_layers": 12, "hidden_size": 256, "seq_length": 128, "temperature": "per_head", **CALIBRATED[case]}
    config, vocab = sized(temperature_init="calibrated", **sizes), 1000  # in which few tokens of a sequence are alike
    assert not config.faults()
    model = Transformer(config, vocab, seed=1)
    reads: list[float] = []
    for block in model.layers.values():
        block.attention.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0].square().mean().item()))
    tokens = torch.randint(vocab, (config.seq_length, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.hidden_states(tokens)
        starts = [block.attention.temperature() for block in model.layers.values()]
    assert len(reads) == config.num_layers
    raw = dataclasses.replace(config, temperature_form="raw")
    for layer, (read, start) in enumerate(zip(reads, starts, strict=True)):
        drift = 0.02 + 0.015 * layer  # attention adds a little, and 256 features are few
        torch.testing.assert_close(start, torch.full_like(start, read), rtol=drift, atol=0)
        name = f"layers.{layer}.attention.temperature_parameter"
        torch.testing.assert_close(initial_value(name, start.shape, raw, seed=1), start)
    growth = starts[-1][0] / starts[0][0]
    assert growth == 1 if case == "norms" else growth > 1.5, "or one temperature would do for all layers"


def test_layers_with_calibrated_temperatures_share_compiled_code() -> None:
    """Dynamo compiles anew for each value of a number that a module holds, and gives up after a few."""
    from torch._dynamo.testing import CompileCounter

    config = sized(temperature_init="calibrated", num_layers=4, hidden_size=64)
    model = Transformer(config, VOCAB, seed=1)
    counter, x_TBD = CompileCounter(), torch.randn(config.seq_length, 2, config.hidden_size)
    torch._dynamo.reset()
    for block in model.layers.values():
        compiled = torch.compile(block.forward, backend=counter, fullgraph=True)(x_TBD)[0]
        torch.testing.assert_close(compiled, block(x_TBD)[0])
    assert counter.frame_count == 1
    assert len({initial_temperature(f"layers.{layer}", config) for layer in range(4)}) == 4
