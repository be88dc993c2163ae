"""Samplers against probabilities computed one token at a time in plain Python."""

import math

import pytest
import torch

from model.generation.sampling import GREEDY, Sampling, next_token

LOGITS = [[1.0, -0.5, 2.0, 0.3, 1.7, -2.0, 0.0], [0.0, 3.0, 2.9, 2.8, -1.0, -1.0, 0.5]]
CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=3),
    Sampling(top_p=0.6),
    Sampling(top_k=4, top_p=0.7, temperature=0.8),
    Sampling(top_p=0.01),
    Sampling(top_k=100),
]


def probabilities(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """The distribution by its definition."""
    weights = {token: math.exp(value / sampling.temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: sampling.top_k]
    total = sum(weights[token] for token in ranked)
    kept: dict[int, float] = {}
    for token in ranked:
        kept[token] = weights[token]
        if sum(kept.values()) / total >= sampling.top_p:
            break
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling) -> None:
    """A fine grid of numbers between 0 and 1 gives each token its share, to within the grid."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for logits in LOGITS:
        drawn = next_token(torch.tensor(logits).expand(len(grid), -1), sampling, grid)
        shares = torch.bincount(drawn, minlength=len(logits)) / len(grid)
        expected = torch.tensor([probabilities(logits, sampling).get(token, 0.0) for token in range(len(logits))])
        torch.testing.assert_close(shares, expected, rtol=0, atol=2e-4)


def test_each_sequence_has_its_own_logits_and_number() -> None:
    batch = torch.tensor(LOGITS)
    for numbers in ([0.1, 0.9], [0.9, 0.1]):
        uniform_B = torch.tensor(numbers, dtype=torch.float64)
        alone = [next_token(batch[i : i + 1], Sampling(), uniform_B[i : i + 1]).item() for i in range(2)]
        assert next_token(batch, Sampling(), uniform_B).tolist() == alone


def test_a_greedy_choice_uses_no_number() -> None:
    nothing = torch.full((2,), math.nan, dtype=torch.float64)
    assert next_token(torch.tensor(LOGITS), GREEDY, nothing).tolist() == [2, 1]


def test_the_largest_number_below_one_draws_a_token_that_may_be_drawn() -> None:
    almost_one = torch.tensor([1 - 2**-53, 1 - 2**-53], dtype=torch.float64)
    for sampling in CASES:
        drawn = next_token(torch.tensor(LOGITS), sampling, almost_one).tolist()
        assert all(token in probabilities(logits, sampling) for token, logits in zip(drawn, LOGITS, strict=True))


def test_faults_name_the_value() -> None:
    faults = Sampling(temperature=-1, top_k=0, top_p=1.5).faults()
    assert [fault.partition(" must")[0] for fault in faults] == ["temperature = -1", "top_k = 0", "top_p = 1.5"]
    assert Sampling(temperature=math.nan).faults() and Sampling().faults() == []
