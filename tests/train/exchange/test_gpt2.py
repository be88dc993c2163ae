"""Our parameters under GPT-2's names: the transformers library must compute the same logits from them."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.initialize import named_parameters
from model.transformer import Transformer
from tests.train.exchange.exported import plain
from train.exchange.folder import gpt2_parameters
from train.exchange.gpt2 import from_gpt2, reasons_against, stacked, to_gpt2, unstacked, without_place

VOCAB_SIZE = 50


def small(**ingredients: Any) -> tuple[ModelConfig, Transformer]:
    """Return a model with random norms and biases too."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "ffn_hidden_size": 48}
    config = ModelConfig(**{"architecture": "SM+LN+G", **sizes, **ingredients}).resolved()
    torch.manual_seed(0)
    model = Transformer(config, VOCAB_SIZE, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return config, model


@pytest.mark.parametrize(
    "ingredients",
    [
        {},
        {"architecture": "SM+LN+R"},
        {"tied_head": False},
        {"activation": "identity"},
        {"biases": "all"},
        {"biases": "all", "temperature": "per_head", "temperature_init": 1.0},
        {"spectral_norm": "QK", "spectral_gain": True},
    ],
)
def test_transformers_computes_the_same_logits(ingredients: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config, model = small(**ingredients)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            activation_function={"identity": "linear"}.get(config.activation, config.activation),
            tie_word_embeddings=config.tied_head,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(dict(gpt2_parameters(plain(config, model))), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    with torch.no_grad():
        expected = model(tokens.T)[0].transpose(0, 1)
        assert (theirs(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("ingredients", [{}, {"tied_head": False}, {"biases": "all"}])
def test_back_again(ingredients: dict[str, Any]) -> None:
    config, model = small(**ingredients)
    ours = dict(named_parameters(model))
    theirs = dict(to_gpt2(config, ours.__getitem__))
    back = dict(from_gpt2(config, theirs.__getitem__))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    leftovers = dict(without_place(config, theirs.__getitem__))
    assert len(leftovers) == (0 if ingredients.get("biases") else 4 * config.num_layers) and all(
        not bias.any() for bias in leftovers.values()
    )


def test_stacking_by_hand() -> None:
    query, key, value = (torch.tensor([[row + offset] for row in range(4)]) for offset in (0, 10, 20))
    both = stacked((query, key, value), num_heads=2)  # heads of width 2
    assert both.flatten().tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    assert all(map(torch.equal, unstacked(both, 2), (query, key, value)))


def test_what_is_no_gpt2() -> None:
    def reasons(**ingredients: Any) -> list[str]:
        return reasons_against(ModelConfig(**ingredients).resolved())

    assert reasons(architecture="SM+LN+G") == reasons(architecture="SM+LN+R", temperature="per_head") == []
    assert reasons(architecture="SM+LN+G", final_norm=False) == ["model.final_norm = false"]
    assert len(reasons(architecture="EReg(SM(t)+ScFuFFN)")) == 4
