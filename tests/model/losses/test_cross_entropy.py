"""The chunked, shardable cross-entropy against torch's on whole logits."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import cross_entropy
from model.cross_entropy import WHOLE_VOCABULARY, VocabularyShard, linear_cross_entropy
from tests.model.interpreter import DEVICE, INTERPRETED, needs_kernels, run_interpreted, starts_the_interpreter

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


def test_a_scale_that_bf16_cannot_hold_scales_all_the_same() -> None:
    """1/3 is 0.2% more in bf16; each gradient is to be rounded once."""
    gradients = []
    for scale in (1.0, 3.0):
        hidden, weight, labels = example(torch.bfloat16)
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB) / scale
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for whole, third in zip(*gradients, strict=True):
        assert torch.equal(third, (whole.float() / 3).bfloat16())


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
@pytest.mark.parametrize("split", [False, True])
def test_on_the_device(split: bool) -> None:
    """One kernel, or compiled passes of a shard, and a product summed in float32, over several chunks, some of the
    vocabulary padding.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 256, generator=generator).mul(0.1)
    weight = torch.randn(50048, 256, generator=generator).mul(0.1)
    labels = torch.randint(50000, (4000,), generator=generator)
    labels[:7] = -100
    shard = VocabularyShard(sum=lambda local: local) if split else WHOLE_VOCABULARY
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        own_hidden, own_weight = (x.bfloat16().to(device, dtype).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(own_hidden, own_weight, labels.to(device), vocab_size=50000, shard=shard)
        loss.backward()
        results.append([x.detach().float().cpu() for x in (loss, own_hidden.grad, own_weight.grad)])
    for value, wanted in zip(*results, strict=True):
        assert (value - wanted).norm() < 1e-2 * wanted.norm()


@starts_the_interpreter
def test_the_kernel_under_the_interpreter() -> None:
    run_interpreted(__file__, "-k", "test_kernel")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "valid"), [(128, 128), (128, 101), (9000, 8999), (12416, 4096), (8, 1)])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_kernel(dtype: torch.dtype, columns: int, valid: int, magnitude: float) -> None:
    """Losses and gradients of rows of logits against float64, some rows ignored, padding larger than all tokens."""
    from model.cross_entropy_triton import losses_in_place

    logits = magnitude * torch.randn(9, columns)
    logits[:, valid:] = 4 * magnitude
    logits[1], logits[2, 0] = 0.0, 5 * magnitude
    logits = logits.to(DEVICE, dtype)
    labels = torch.randint(valid, (9,))
    labels[3], labels[4], labels[5] = -100, 0, valid - 1
    exact = logits[:, :valid].double().cpu().requires_grad_()
    expected_losses = F.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
    expected_losses.sum().backward()
    evaluated = losses_in_place(logits, labels.to(logits.device), valid, with_gradient=False)
    assert torch.equal(logits[:, :valid].double().cpu(), exact.detach())
    losses = losses_in_place(logits, labels.to(logits.device), valid, with_gradient=True)
    assert losses.dtype == torch.float32 and torch.equal(losses, evaluated) and losses[3] == 0
    torch.testing.assert_close(losses.double().cpu(), expected_losses.detach(), rtol=2e-6, atol=2e-6 * magnitude)
    gradient = logits.double().cpu()
    assert torch.count_nonzero(gradient[:, valid:]) == torch.count_nonzero(gradient[3]) == 0
    bf16 = 2**-7 if INTERPRETED else 2**-8  # the interpreter truncates
    rounding = {torch.float32: 2e-6, torch.bfloat16: bf16, torch.float16: 2**-11}[dtype]
    tiny = 6e-8 if dtype == torch.float16 else 0.0  # below it float16 has no number
    allowed = rounding + 1e-6 * magnitude
    torch.testing.assert_close(gradient[:, :valid], exact.grad, rtol=allowed, atol=tiny + 2e-7)


@needs_kernels
def test_kernel_lets_what_is_not_a_number_through() -> None:
    from model.cross_entropy_triton import losses_in_place

    logits = torch.zeros(3, 300, device=DEVICE)
    logits[1, 7], logits[2, 299] = torch.nan, torch.inf
    losses = losses_in_place(logits, torch.zeros(3, dtype=torch.int64, device=logits.device), 300, with_gradient=True)
    assert losses.isfinite().tolist() == [True, False, False]


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
