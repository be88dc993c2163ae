"""The blockwise divergence against torch's own KL on whole logits, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import cross_entropy
from model.distillation import linear_divergence, relative_distance

V, PADDED, TEACHER_PADDED, D, E = 11, 16, 13, 6, 5


def drawn(*shape: int, seed: int, requires_grad: bool = False) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(requires_grad)


@pytest.mark.parametrize("chunk_bytes", [1 << 29, 3 * PADDED * 8])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, temperature: float) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    student, taught = drawn(4, 2, D, seed=0, requires_grad=True), drawn(4, 2, E, seed=1)
    weight, teacher_weight = drawn(PADDED, D, seed=2, requires_grad=True), drawn(TEACHER_PADDED, E, seed=3)
    loss = linear_divergence(student, weight, taught, teacher_weight, vocab_size=V, temperature=temperature)
    found = torch.autograd.grad(0.3 * loss, (student, weight))

    log_q = F.log_softmax(student @ weight[:V].T / temperature, dim=-1)
    log_p = F.log_softmax(taught @ teacher_weight[:V].T / temperature, dim=-1)
    expected = temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and loss > 1
    for ours, theirs in zip(found, torch.autograd.grad(0.3 * expected, (student, weight)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    hidden, weight = drawn(5, D, seed=0), drawn(PADDED, D, seed=1)
    assert abs(linear_divergence(hidden, weight, hidden, weight, vocab_size=V, temperature=2.0)) < 1e-12


def test_distance_of_residuals() -> None:
    states = [drawn(3, 2, D, seed=seed) for seed in (0, 1)]
    taught = [drawn(3, 2, D, seed=seed) for seed in (2, 3)]
    expected = sum(
        float((s[t, b] - w[t, b]) @ (s[t, b] - w[t, b]) / (w[t, b] @ w[t, b])) / 2
        for s, w in zip(states, taught, strict=True)
        for t in range(3)
        for b in range(2)
    )
    assert relative_distance(states, taught).item() == pytest.approx(expected, rel=1e-12)
