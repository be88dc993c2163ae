"""The regularizer against the published formula, Algorithm 1 and values worked out by hand."""

import math

import pytest
import torch

from model.regularizer import RegularizerConfig, entropy_penalty, penalty, reachable_entropy
from tests.model import reference

LAYERS, SEQUENCES, HEADS, TOKENS = 2, 5, 3, 8
MARGIN = 0.15


def materialized() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random causal attention matrices [B, N, T, T] and thresholds [N] of each layer."""
    generator = torch.Generator().manual_seed(3)
    attentions = []
    for _ in range(LAYERS):
        q, k = torch.randn(2, SEQUENCES * HEADS, TOKENS, 4, generator=generator, dtype=torch.float64)
        matrix = reference.attention_matrix(q, k, [0.7] * TOKENS)
        attentions.append(matrix.unflatten(0, (SEQUENCES, HEADS)))
    thresholds = 0.3 + 0.4 * torch.rand(LAYERS, HEADS, generator=generator, dtype=torch.float64)
    return attentions, list(thresholds)


def test_per_query_is_the_published_code_with_the_converted_coefficient() -> None:
    """lambda * sum over sequences and positions = (lambda B T) * mean: 1e-5 becomes 4e-4 at B = 5, T = 8."""
    attentions, thresholds = materialized()
    published_lambda = 1e-5
    published = published_lambda * reference.published_penalty(attentions, thresholds, MARGIN, math.log(TOKENS))
    config = RegularizerConfig(coefficient=published_lambda * SEQUENCES * TOKENS, margin=MARGIN)
    entropies = [reference.row_entropies(matrix) for matrix in attentions]
    ours = config.coefficient * entropy_penalty(entropies, thresholds, config, TOKENS)
    torch.testing.assert_close(ours, published, rtol=1e-13, atol=0)


def test_paper_coefficient_converts_to_the_default() -> None:
    assert pytest.approx(1e-5 * 128 * 128, rel=2e-3) == RegularizerConfig().coefficient


def test_per_query_does_not_depend_on_the_number_of_sequences() -> None:
    attentions, thresholds = materialized()
    config = RegularizerConfig(margin=MARGIN)
    once = [reference.row_entropies(matrix) for matrix in attentions]
    twice = [torch.cat([entropy, entropy]) for entropy in once]
    torch.testing.assert_close(
        entropy_penalty(once, thresholds, config, TOKENS), entropy_penalty(twice, thresholds, config, TOKENS)
    )


def test_per_head_is_algorithm_1() -> None:
    attentions, thresholds = materialized()
    config = RegularizerConfig(margin=MARGIN, granularity="per_head")
    entropies = [reference.row_entropies(matrix) for matrix in attentions]
    ours = entropy_penalty(entropies, thresholds, config, TOKENS)
    expected = reference.algorithm_1(attentions, thresholds, MARGIN, math.log(TOKENS))
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    assert ours > 0


def test_granularities_differ() -> None:
    attentions, thresholds = materialized()
    entropies = [reference.row_entropies(matrix) for matrix in attentions]
    values = [
        entropy_penalty(entropies, thresholds, RegularizerConfig(margin=MARGIN, granularity=granularity), TOKENS)
        for granularity in ("per_query", "per_head")
    ]
    assert values[0] > 1.5 * values[1]


def test_penalty_by_hand() -> None:
    """ln T = 2, theta = 0.5, margin = 0.25: E within [0.5, 1.5] is free, beyond it (E - 1)^2, from either side."""
    entropy = torch.tensor([0.0, 0.4, 0.5, 1.0, 1.5, 1.6, 2.0], dtype=torch.float64)
    values = penalty(entropy, torch.tensor(0.5, dtype=torch.float64), 0.25, 2.0)
    expected = torch.tensor([1.0, 0.36, 0.0, 0.0, 0.0, 0.36, 1.0], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)


def test_gradients_by_hand() -> None:
    """dP/dE = 2 delta and dP/dtheta = -2 delta ln T outside the margin, both 0 inside."""
    entropy = torch.tensor([0.25, 1.25], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    penalty(entropy, theta, 0.25, 2.0).sum().backward()
    assert entropy.grad.tolist() == [-1.5, 0.0]
    assert theta.grad.tolist() == [3.0, 0.0]


def test_zero_margin_has_no_dead_zone() -> None:
    values = penalty(torch.tensor([0.99, 1.0, 1.01], dtype=torch.float64), torch.tensor(0.5), 0.0, 2.0)
    torch.testing.assert_close(values, torch.tensor([1e-4, 0.0, 1e-4], dtype=torch.float64))


@pytest.mark.parametrize("shape", ["square", "hinge", "floor"])
@pytest.mark.parametrize("target", ["constant", "causal"])
@pytest.mark.parametrize("within_documents", [False, True])
def test_every_shape_and_target_is_its_formula(shape: str, target: str, within_documents: bool) -> None:
    """The reference takes one row of one head after the other, in Python numbers."""
    generator = torch.Generator().manual_seed(4)
    entropies = [2 * torch.rand(SEQUENCES, HEADS, TOKENS, generator=generator).double() for _ in range(LAYERS)]
    thresholds = [0.2 + 0.5 * torch.rand(HEADS, generator=generator).double() for _ in range(LAYERS)]
    starts_BT = torch.tensor([0, 0, 0, 3, 3, 3, 3, 7]).repeat(SEQUENCES, 1) if within_documents else None
    leaves = [*entropies, *thresholds]
    for leaf in leaves:
        leaf.requires_grad_()
    config = RegularizerConfig(margin=MARGIN, shape=shape, target=target)
    ours = entropy_penalty(entropies, thresholds, config, TOKENS, starts_BT)
    expected = reference.penalty_by_rows(entropies, thresholds, MARGIN, shape, target, starts_BT)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    found, wanted = (torch.autograd.grad(value, leaves) for value in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-16)
    assert ours > 0


@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
def test_each_layer_has_its_own_margin(granularity: str) -> None:
    """The mean over layers of each layer's penalty alone, with the margin of that layer."""
    attentions, thresholds = materialized()
    published = {"per_query": reference.published_penalty, "per_head": reference.algorithm_1}[granularity]
    queries, margins = SEQUENCES * TOKENS if granularity == "per_query" else 1, [0.02, 0.3]
    alone = [
        published([attention], [threshold], margin, math.log(TOKENS)) / queries
        for attention, threshold, margin in zip(attentions, thresholds, margins, strict=True)
    ]
    config = RegularizerConfig(margin=margins, granularity=granularity)
    entropies = [reference.row_entropies(matrix) for matrix in attentions]
    found = entropy_penalty(entropies, thresholds, config, TOKENS)
    torch.testing.assert_close(found, torch.stack(alone).mean(), rtol=1e-13, atol=0)
    exchanged = RegularizerConfig(margin=margins[::-1], granularity=granularity)
    assert not torch.isclose(found, entropy_penalty(entropies, thresholds, exchanged, TOKENS), rtol=1e-3)


def test_a_query_with_one_position_has_no_causal_penalty() -> None:
    entropy = torch.zeros(1, 1, 1, TOKENS, dtype=torch.float64)
    for shape in ("square", "hinge", "floor"):
        reachable = reachable_entropy(RegularizerConfig(target="causal"), TOKENS, entropy)
        values = penalty(entropy, torch.tensor(0.5), 0.1, reachable, shape).flatten()
        assert values[0] == 0 and bool((values[1:] > 0).all()), shape


def test_a_hinge_is_continuous_at_its_margin_where_the_published_penalty_jumps() -> None:
    entropy = torch.tensor([0.5 - 1e-9, 1.5 + 1e-9], dtype=torch.float64)
    at_margin = {
        shape: penalty(entropy, torch.tensor(0.5), 0.25, 2.0, shape).tolist() for shape in ("square", "hinge", "floor")
    }
    assert at_margin["square"] == pytest.approx([0.25, 0.25])
    assert at_margin["hinge"] == at_margin["floor"][:1] * 2 == pytest.approx([0, 0], abs=1e-15)
