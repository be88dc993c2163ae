"""The exported network must give the training stack's logits, whatever the architecture, the padding and the cache."""

from typing import Any

import pytest
import torch

from model.config import ARCHITECTURES
from model.initialize import named_parameters
from tests.train.exchange.exported import VOCAB_SIZE, logits, network, plain, small
from train.exchange.plain import PlainWeights

pytest.importorskip("transformers")

VARIANTS: list[dict[str, Any]] = [
    *({"architecture": name} for name, fixed in ARCHITECTURES.items() if fixed["norm"] != "taper"),
    {"positions": "rotary"},
    {"tied_head": False},
    {"final_norm": False},
    {"architecture": "SM+LN+G", "weight_norm": "QKVO+FFN"},
    {"spectral_norm": "QK+FFN"},
    {"spectral_norm": "QK+FFN", "spectral_gain": True},
    {"temperature": "per_head"},
    {"temperature_form": "raw", "temperature_init": 0.5},
    {"temperature_init": "calibrated"},
    {"architecture": "SM+ScFuFFN", "norm": "layernorm"},
    {"architecture": "SM+ScFuFFN", "norm": "layernorm", "biases": "all"},
    {"architecture": "SM+LN+G", "activation": "gelu_tanh", "biases": "all"},
    {"biases": "all"},
    {"architecture": "EReg(SM(t)+ScFuFFN)", "norm": "taper"},
    {"architecture": "SM+LN+G", "norm": "taper", "biases": "all", "weight_norm": "QK+FFN"},
]


@pytest.mark.parametrize("ingredients", VARIANTS, ids=lambda each: " ".join(map(str, each.values())))
def test_logits(ingredients: dict[str, Any]) -> None:
    config, model = small(**ingredients)
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    expected = logits(model, tokens)
    assert (logits(network(plain(config, model)), tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_spectral_norms_are_found_where_another_layout_saved_their_vectors() -> None:
    config, model = small(architecture="SM+SN", spectral_norm="QKVO+FFN")
    saved = {name: parameter.detach() for name, parameter in named_parameters(model)}
    weights = PlainWeights(config, lambda name: saved[name])
    query_N3HD = weights.read("layers.1.attention.query_key_value.weight").unflatten(0, (4, 3, -1))
    matrices = [weights.read("layers.1.ffn.up.weight"), query_N3HD[:, 0].flatten(0, 1)]
    for matrix in matrices:
        assert float(torch.linalg.svdvals(matrix)[0]) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("ingredients", [{}, {"positions": "rotary"}, {"architecture": "SM+LN+G"}])
def test_padding_and_cache_change_nothing(ingredients: dict[str, Any]) -> None:
    exported = network(plain(*small(**ingredients)))
    short, long = torch.randint(VOCAB_SIZE, (1, 4)), torch.randint(VOCAB_SIZE, (1, 7))
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    both = exported(padded, attention_mask=mask).logits
    assert torch.allclose(both[0, 3:], logits(exported, short)[0], atol=1e-5)
    assert torch.allclose(both[1], logits(exported, long)[0], atol=1e-5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = exported.generate(padded, attention_mask=mask, **options)
    uncached = exported.generate(padded, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(generated, uncached)
    alone = exported.generate(short, **options)
    assert torch.equal(generated[0, 7:], alone[0, 4:])


def test_entropies_are_those_of_training() -> None:
    config, model = small()
    tokens = torch.randint(VOCAB_SIZE, (2, 16))
    exported = network(plain(config, model))
    output = exported(tokens, output_attentions=True)
    _, expected_BNT = model(tokens.T)
    for entropy, expected, weights in zip(output.entropies, expected_BNT, output.attentions, strict=True):
        assert torch.allclose(entropy, expected, atol=1e-5)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 16), atol=1e-5)
        assert not weights.triu(1).any()
    assert torch.allclose(output.logits, logits(exported, tokens), atol=1e-5)
    assert exported(tokens, output_entropies=True).attentions is None and exported(tokens).entropies is None


def test_loss_is_that_of_the_next_tokens() -> None:
    exported = network(plain(*small()))
    tokens = torch.randint(VOCAB_SIZE, (2, 16))
    log_probability = logits(exported, tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])
    assert torch.allclose(exported(tokens, labels=tokens).loss, -log_probability.mean())


def test_tokens_beyond_the_context_are_refused() -> None:
    exported = network(plain(*small()))
    with pytest.raises(ValueError, match="a sequence has 17 tokens, and this model was trained on 16"):
        exported(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="trained on 16"):
        exported.generate(torch.ones(1, 10, dtype=torch.long), min_new_tokens=8, max_new_tokens=8)
    padded, mask = torch.zeros(1, 17, dtype=torch.long), torch.tensor([[0] + [1] * 16])
    assert exported(padded, attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        exported(padded, attention_mask=mask[:, :9])
