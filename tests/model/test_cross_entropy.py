"""The chunked, shardable cross-entropy against torch's on whole logits."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import cross_entropy
from model.cross_entropy import VocabularyShard, linear_cross_entropy

TOKENS, SEQUENCES, WIDTH, VOCAB, PADDED = 7, 3, 6, 19, 24


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, B, D], head [V padded, D] whose padding is large enough to win, labels [T, B], some ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, SEQUENCES, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    weight[VOCAB:] *= 20
    labels = torch.randint(VOCAB, (TOKENS, SEQUENCES), generator=generator)
    labels[2, 1] = labels[6] = -100
    labels[0, 0], labels[0, 1] = 0, VOCAB - 1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients through whole logits."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = hidden.flatten(0, 1) @ weight[:VOCAB].T
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    (0.37 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * PADDED * rows)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 21, 1000])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    set_chunk_rows(monkeypatch, chunk_rows)
    hidden, weight, labels = example()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    (0.37 * loss).backward()
    for actual, wanted in zip((loss.detach(), hidden.grad, weight.grad), expected(hidden, weight, labels), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)
    assert torch.count_nonzero(weight.grad[VOCAB:]) == 0


def test_chunks_bound_the_logits_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(monkeypatch, 4)
    sizes = []
    original = cross_entropy._row_statistics

    def spy(logits: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(logits.shape[0])
        return original(logits, *others)

    monkeypatch.setattr(cross_entropy, "_row_statistics", spy)
    hidden, weight, labels = example()
    linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert sizes == [4, 4, 4, 4, 4, 1]


def test_any_negative_label_is_ignored() -> None:
    hidden, weight, labels = example()
    relabelled = torch.where(labels < 0, -1, labels)
    one = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert torch.equal(one, linear_cross_entropy(hidden, weight, relabelled, vocab_size=VOCAB))


def test_nothing_to_predict_costs_nothing() -> None:
    hidden, weight, labels = example()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), vocab_size=VOCAB)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(hidden.grad) + torch.count_nonzero(weight.grad) == 0


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = example()
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected(hidden, weight, labels)[0], rtol=1e-12, atol=0)
    assert bool(hidden.grad.isfinite().all())


def test_without_gradients() -> None:
    hidden, weight, labels = example()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected(hidden, weight, labels)[0])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_one_side_learns(frozen: str) -> None:
    """A frozen head, or a head on frozen features: the other gradient is the same."""
    hidden, weight, labels = example()
    wanted = expected(hidden, weight, labels)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (0.37 * linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)).backward()
    learns, gradient = (weight, wanted[2]) if frozen == "hidden" else (hidden, wanted[1])
    torch.testing.assert_close(learns.grad, gradient, rtol=1e-12, atol=1e-13)


def test_bfloat16_accumulates_in_float32() -> None:
    """Loss in float32, within bf16's own rounding of the logits; gradients in the inputs' type."""
    hidden, weight, labels = example(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    (0.37 * loss).backward()
    wanted = expected(hidden.double(), weight.double(), labels)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), wanted[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(weight.grad.double(), wanted[2], rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_on_the_device() -> None:
    """Compiled passes and a product summed in float32, over several chunks, some of the vocabulary padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 256, generator=generator).mul(0.1)
    weight = torch.randn(50048, 256, generator=generator).mul(0.1)
    labels = torch.randint(50000, (4000,), generator=generator)
    labels[:7] = -100
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        own_hidden, own_weight = (x.bfloat16().to(device, dtype).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(own_hidden, own_weight, labels.to(device), vocab_size=50000)
        loss.backward()
        results.append([x.detach().float().cpu() for x in (loss, own_hidden.grad, own_weight.grad)])
    for value, wanted in zip(*results, strict=True):
        assert (value - wanted).norm() < 1e-2 * wanted.norm()


class Lockstep:
    """Reductions over threads that stand for ranks: everybody hands in a tensor, everybody gets the result."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.tensors = threading.Barrier(ranks, timeout=30), [torch.empty(0)] * ranks

    def reduction(self, rank: int, combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def reduce(local: Tensor) -> Tensor:
            self.tensors[rank] = local
            self.barrier.wait()
            result = combine(torch.stack(self.tensors))
            self.barrier.wait()
            return result

        return reduce


def run_shards(bounds: list[int], chunk: Callable[[int], None] | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Loss, hidden gradient and weight gradient of every vocabulary shard [bounds[r], bounds[r + 1])."""
    ranks = len(bounds) - 1
    lockstep, results = Lockstep(ranks), [None] * ranks
    hidden, weight, labels = example()

    def rank_main(rank: int) -> None:
        own_hidden = hidden.detach().clone().requires_grad_()
        own_weight = weight.detach()[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
        shard = VocabularyShard(
            bounds[rank],
            lockstep.reduction(rank, lambda stacked: stacked.amax(0)),
            lockstep.reduction(rank, lambda stacked: stacked.sum(0)),
        )
        loss = linear_cross_entropy(own_hidden, own_weight, labels, vocab_size=VOCAB, shard=shard)
        gradients = torch.autograd.grad(0.37 * loss, (own_hidden, own_weight))
        results[rank] = (loss.detach(), *gradients)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, "a shard failed"
    return results


@pytest.mark.parametrize("bounds", [[0, 24], [0, 12, 24], [0, 8, 16, 24], [0, 20, 24], [0, 6, 12, 18, 24]])
def test_vocabulary_shards(monkeypatch: pytest.MonkeyPatch, bounds: list[int]) -> None:
    """Also a shard that is nothing but padding: [20, 24) of a vocabulary of 19."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)  # the same number of rows, one, on uneven shards
    results = run_shards(bounds)
    hidden, weight, labels = example()
    loss, grad_hidden, grad_weight = expected(hidden, weight, labels)
    for local_loss, _, _ in results:
        torch.testing.assert_close(local_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(local for _, local, _ in results), grad_hidden, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.cat([local for _, _, local in results]), grad_weight, rtol=1e-11, atol=1e-13)
