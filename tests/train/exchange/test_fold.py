"""A folded network computes the same function, exactly in exact arithmetic."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from tests.train.exchange.exported import VOCAB_SIZE, logits, network, plain, small
from train.exchange.fold import FoldedWeights, fold, reasons_against

pytest.importorskip("transformers")


def folded(weights: Any, limit: float) -> FoldedWeights:
    products = [weights.ffn_product(layer) for layer in range(weights.model.num_layers)]
    return FoldedWeights(weights, fold(products, not weights.model.final_norm, limit))


@pytest.mark.parametrize("limit", [1e9, 20.0, 6.0, 1.0])
@pytest.mark.parametrize(
    "ingredients",
    [
        {"num_layers": 5},
        {"num_layers": 5, "final_norm": False},
        {"positions": "rotary", "tied_head": False},
        {"temperature": "per_head"},
        {"architecture": "SM"},
        {"architecture": "SM+WN"},
        {"num_layers": 5, "biases": "all"},
        {"architecture": "SM+TN", "temperature": "per_head"},
        {"architecture": "SM+ScFFN", "biases": "all", "final_norm": False},
    ],
)
def test_same_logits(ingredients: dict[str, Any], limit: float) -> None:
    weights = plain(*small(**ingredients), dtype=torch.float64)
    after = folded(weights, limit)
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    expected = logits(network(weights), tokens)
    assert (logits(network(after), tokens) - expected).abs().max() < 1e-12 * expected.abs().max()
    if limit == 1e9:
        assert set(after.ffn_kinds) == {"none"} and not after.is_tied
    if limit == 1.0:
        assert set(after.ffn_kinds) == {"matrix"} and after.is_tied == weights.is_tied


def test_conditions_stay_within_the_limit() -> None:
    torch.manual_seed(0)
    products = [torch.eye(16, dtype=torch.float64) + 0.15 * torch.randn(16, 16, dtype=torch.float64) for _ in range(12)]
    for limit in (3.0, 10.0, 100.0, 1e6):
        for head_is_linear in (False, True):
            folding = fold(products, head_is_linear, limit)
            assert max(folding.conditions) <= limit
            assert head_is_linear or folding.conditions[-1] == 1
    assert len(fold(products, False, 10.0).kept) > len(fold(products, False, 100.0).kept)


def test_the_middle_is_better_conditioned_than_an_end() -> None:
    products = [torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))] * 4
    assert max(fold(products, False, 1e9).conditions) == pytest.approx(16)
    assert max(fold(products, True, 1e9).conditions) == pytest.approx(4)
    assert list(fold(products, False, 4.0).kept) == [1]  # 2, 3 before the head; 0 alone


def test_what_cannot_be_folded() -> None:
    def reasons(architecture: str) -> list[str]:
        return reasons_against(ModelConfig(architecture=architecture).resolved())

    assert reasons("EReg(SM(t)+ScFuFFN)") == reasons("SM") == []
    assert "LayerNorm" in reasons("SM+LN")[0]
    assert reasons("SM+R") == ["model.activation = 'relu' is not linear"]
    assert len(reasons("SM+LN+G")) == 2
