"""Which parameters may have a gradient of exactly zero: what the model says, against autograd."""

import pytest
import torch

from model.config import ARCHITECTURES, ModelConfig
from model.initialize import named_parameters
from model.regularizer import RegularizerConfig, entropy_penalty
from model.transformer import Transformer

VOCAB_SIZE, LAYERS = 40, 2
SIZES = {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}


def without_gradient(margin: float, seq_length: int = 16, **choices: object) -> tuple[set[str], set[str]]:
    """Parameters whose gradient is exactly zero in a model at its initial weights, and those that may be so."""
    config = ModelConfig(**{**SIZES, "seq_length": seq_length, **choices}).resolved()  # type: ignore[arg-type]
    model = Transformer(config, VOCAB_SIZE, seed=1)
    tokens_BT = torch.randint(VOCAB_SIZE, (4, seq_length + 1), generator=torch.Generator().manual_seed(0))
    loss, entropies_BNT = model(tokens_BT[:, :-1].t(), tokens_BT[:, 1:].t())
    if config.regularized:
        thresholds = [block.attention.threshold for block in model.layers.values()]
        settings = RegularizerConfig(coefficient=1.0, margin=margin)
        loss = loss + entropy_penalty(entropies_BNT, thresholds, settings, seq_length)
    loss.backward()
    zero = {name for name, p in named_parameters(model) if p.grad is None or not p.grad.any()}
    may = {
        f"layers.{layer}.attention.{name}"
        for layer, block in model.layers.items()
        for name in block.attention.may_lack_gradient(bool((entropies_BNT[int(layer)].mean((0, 2)) == 0).any()))
    }
    return zero, may


def in_layers(*names: str) -> set[str]:
    return {f"layers.{layer}.attention.{name}" for layer in range(LAYERS) for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_else_lacks_a_gradient(architecture: str) -> None:
    zero, may = without_gradient(margin=0.0, architecture=architecture)
    assert zero == in_layers("key_bias") and zero <= may


def test_a_threshold_within_the_margin_has_none() -> None:
    zero, may = without_gradient(margin=1.0)
    assert zero == in_layers("key_bias", "threshold") and zero <= may


def test_rotary_positions_let_a_bias_of_the_keys_act() -> None:
    zero, may = without_gradient(margin=0.0, positions="rotary")
    assert zero == set() and "layers.0.attention.key_bias" not in may


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_sequences_of_one_token_leave_attention_nothing_to_choose(positions: str) -> None:
    zero, may = without_gradient(margin=0.0, seq_length=1, positions=positions, architecture="SM(t)+ScFuFFN")
    assert zero == in_layers("key_bias", "query_bias", "temperature_parameter") and zero <= may


def test_sequences_of_one_token_leave_gains_of_queries_and_keys_without_gradient() -> None:
    zero, may = without_gradient(margin=0.0, seq_length=1, architecture="SM", spectral_norm="QK", spectral_gain=True)
    assert zero == in_layers("key_bias", "query_bias", "query_key_value.gamma") and zero <= may
