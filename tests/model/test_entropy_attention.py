"""Attention with entropies on a CPU: against what PyTorch computes another way, and the operator's promises."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.entropy_attention import blocked, entropy_attention, joint_entropy_attention
from model.entropy_attention.operators import attention_backward, attention_forward


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def inputs(
    batch: int, heads: int, key_heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(batch, heads, tokens, width)] + 2 * [(batch, key_heads, tokens, width)]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


def by_distributions(q: Tensor, k: Tensor, v: Tensor, divisor: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output through scaled_dot_product_attention, entropies row by row through torch.distributions."""
    group = q.shape[1] // k.shape[1]
    k, v = (torch.cat([x[:, [head // group]] for head in range(q.shape[1])], 1) for x in (k, v))
    q = q / divisor
    output = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    tokens, logits = q.shape[2], torch.einsum("bnth,bnsh->bnts", q, k) / math.sqrt(q.shape[3])
    entropies = []
    for row in range(tokens):
        seen = logits[:, :, row, : row + 1 if causal else tokens]
        entropies.append(torch.distributions.Categorical(logits=seen).entropy())
    return output, torch.stack(entropies, -1)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("shape", "causal", "temperature_shape"),
    [
        ((2, 4, 2, 37, 16), True, (4, 37)),
        ((1, 3, 3, 150, 8), True, (3,)),
        ((2, 4, 1, 133, 5), False, (4, 133)),
        ((1, 2, 2, 1, 8), True, None),
    ],
)
def test_output_entropy_and_gradients(
    implementation: str, shape: tuple[int, ...], causal: bool, temperature_shape: tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    q, k, v = inputs(*shape)
    t = None
    divisor = torch.ones(1, dtype=torch.float64)
    if temperature_shape:
        t = (torch.rand(temperature_shape, dtype=torch.float64) + 0.5).requires_grad_()
        divisor = t.view(temperature_shape[0], -1, 1)
    output, entropy = entropy_attention(q, k, v, temperature=t, causal=causal, implementation=implementation)  # type: ignore[arg-type]
    expected_output, expected_entropy = by_distributions(q, k, v, divisor, causal)
    assert relative_error(output, expected_output) < 1e-12
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(output), torch.randn_like(expected_entropy)
    wanted = [x for x in (q, k, v, t) if x is not None]
    gradients = torch.autograd.grad((output * weights[0]).sum() + (entropy * weights[1]).sum(), wanted)
    loss = (expected_output * weights[0]).sum() + (expected_entropy * weights[1]).sum()
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-11, rtol=1e-9)


def document_starts(batch: int, tokens: int, boundaries: list[int]) -> Tensor:
    """[B, T]: each position's first key, documents beginning at `boundaries`, shifted by one a sequence."""
    starts = torch.zeros(batch, tokens, dtype=torch.long)
    for sequence in range(batch):
        for boundary in boundaries:
            starts[sequence, boundary + sequence :] = boundary + sequence
    return starts


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("boundaries", [[40, 41, 130], [128], []])
def test_documents_are_as_if_alone(implementation: str, boundaries: list[int]) -> None:
    torch.manual_seed(2)
    q, k, v = inputs(2, 4, 2, 150, 8)
    t = (torch.rand(4, 150, dtype=torch.float64) + 0.5).requires_grad_()
    starts = document_starts(2, 150, boundaries)
    output, entropy = entropy_attention(q, k, v, temperature=t, document_start=starts, implementation=implementation)  # type: ignore[arg-type]
    weights = torch.randn_like(output), torch.randn_like(entropy)
    gradients = torch.autograd.grad((output * weights[0]).sum() + (entropy * weights[1]).sum(), (q, k, v, t))
    loss = 0
    for sequence in range(2):
        edges = [0, *(boundary + sequence for boundary in boundaries), 150]
        for begin, end in itertools.pairwise(edges):
            at = (slice(sequence, sequence + 1), slice(None), slice(begin, end))
            alone = entropy_attention(q[at], k[at], v[at], temperature=t[:, begin:end])
            torch.testing.assert_close(output[at], alone[0], atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(entropy[at], alone[1], atol=1e-12, rtol=1e-12)
            loss = loss + (alone[0] * weights[0][at]).sum() + (alone[1] * weights[1][at]).sum()
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, (q, k, v, t)), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-11, rtol=1e-9)


def test_documents_without_the_causal_mask() -> None:
    q, k, v = inputs(2, 2, 2, 140, 8)
    starts = document_starts(2, 140, [20, 135])
    found = entropy_attention(q, k, v, document_start=starts, causal=False)
    expected = entropy_attention(q, k, v, document_start=starts, causal=False, implementation="reference")
    for value, same in zip(found, expected, strict=True):
        torch.testing.assert_close(value, same, atol=1e-12, rtol=1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 3)
    q, k, v = inputs(1, 2, 1, 7, 4)
    t = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, t: entropy_attention(q, k, v, temperature=t + 0.5), (q, k, v, t), fast_mode=True
    )


@pytest.mark.parametrize(("rows", "scores"), [(16, 2**20), (128, 1), (7, 2**10)])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, scores: int) -> None:
    q, k, v = inputs(3, 4, 2, 50, 8)
    expected = entropy_attention(q, k, v)
    monkeypatch.setattr(blocked, "BLOCK_ROWS", rows)
    monkeypatch.setattr(blocked, "SCORES_AT_ONCE", scores)
    for value, same in zip(entropy_attention(q, k, v), expected, strict=True):
        torch.testing.assert_close(value, same, atol=1e-12, rtol=1e-12)


def test_a_row_with_one_key_has_entropy_zero() -> None:
    q, k, v = inputs(2, 2, 2, 5, 8, torch.float32)
    _, entropy = entropy_attention(q * 1e3, k, v)
    assert (entropy[:, :, 0] == 0).all()
    _, entropy = entropy_attention(q[:, :, :1] * 1e3, k[:, :, :1], v[:, :, :1], causal=False)
    assert (entropy == 0).all()


EXTREMES = {
    "one-hot rows": (30.0, None),
    "uniform rows": (0.0, None),
    "scores of 1e4": (100.0, None),
    "temperature 1e-2": (1.0, 1e-2),
}


def extreme_errors(case: str, implementation: str, device: str = "cpu") -> tuple[list[float], list[float]]:
    """Relative errors against float64 of an implementation and of plain float32 autograd, the same inputs each."""
    torch.manual_seed(1)
    spread, temperature = EXTREMES[case]
    q, k, v = (x.detach().to(device) for x in inputs(1, 2, 2, 96, 64, torch.float32))
    q, k = q * spread, k * spread
    weights = torch.randn(1, 2, 96, 64, device=device), torch.randn(1, 2, 96, device=device)
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, implementation), (torch.float32, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        t = None if temperature is None else torch.full((2,), temperature, dtype=dtype, device=device)
        output, entropy = entropy_attention(*leaves, temperature=t, implementation=name)  # type: ignore[arg-type]
        loss = (output * weights[0].to(dtype)).sum() + (entropy * weights[1].to(dtype)).sum()
        results.append([output, entropy, *torch.autograd.grad(loss, leaves)])
    exact, ours, plain = results
    return (
        [relative_error(x, y) for x, y in zip(ours, exact, strict=True)],
        [relative_error(x, y) for x, y in zip(plain, exact, strict=True)],
    )


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits_are_no_worse_than_plain_autograd(case: str) -> None:
    ours, plain = extreme_errors(case, "blocked")
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_entropy_can_be_left_out() -> None:
    q, k, v = inputs(1, 2, 2, 20, 8)
    output, entropy = entropy_attention(q, k, v, return_entropy=False)
    assert entropy is None
    gradient = torch.autograd.grad(output.sum(), q)
    with_entropy, _ = entropy_attention(q, k, v)
    torch.testing.assert_close(output, with_entropy)
    torch.testing.assert_close(gradient, torch.autograd.grad(with_entropy.sum(), q))


def test_results_keep_the_memory_order_of_their_inputs() -> None:
    """The model hands in views [B, N, T, H] of [T, B, N, H], value being every third row of a joint projection."""
    joint = torch.randn(10, 2, 4, 3, 8, requires_grad=True)
    q, k, v = (x.permute(1, 2, 0, 3) for x in joint.unbind(3))
    output, _ = entropy_attention(q, k, v)
    assert output.permute(2, 0, 1, 3).is_contiguous()
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert all(x.permute(2, 0, 1, 3).is_contiguous() for x in gradients)
    expected, _ = entropy_attention(q.contiguous(), k.contiguous(), v.contiguous(), implementation="reference")
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("documents", [False, True])
def test_a_joint_projection_has_a_joint_gradient(documents: bool) -> None:
    joint = torch.randn(40, 2, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    t = (torch.rand(4, 40, dtype=torch.float64) + 0.5).requires_grad_()
    starts = document_starts(2, 40, [11, 30]) if documents else None
    weights = torch.randn(40, 2, 4, 8, dtype=torch.float64), torch.randn(2, 4, 40, dtype=torch.float64)

    def gradients(output_TBNH: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output_TBNH * weights[0]).sum() + (entropy * weights[1]).sum(), (joint, t))

    output, entropy = joint_entropy_attention(joint, temperature=t, document_start=starts)
    assert output.is_contiguous()
    q, k, v = (x.permute(1, 2, 0, 3) for x in joint.unbind(3))
    expected = entropy_attention(q, k, v, temperature=t, document_start=starts, implementation="reference")
    for value, same in zip(
        (output, entropy, *gradients(output, entropy)),
        (expected[0].permute(2, 0, 1, 3), expected[1], *gradients(expected[0].permute(2, 0, 1, 3), expected[1])),
        strict=True,
    ):
        torch.testing.assert_close(value, same, atol=1e-11, rtol=1e-9)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_memory_is_linear_in_the_sequence() -> None:
    largest = []
    for tokens in (1024, 2048):
        q, k, v = (torch.randn(1, 1, tokens, 8) for _ in range(3))
        with LargestTensor() as record:
            output, entropy, lse = blocked.forward(q, k, v, None, None, 1.0, True, True)
            gradients = (torch.empty_like(x) for x in (q, k, v))
            blocked.backward(output, entropy, q, k, v, None, None, output, entropy, lse, 1.0, True, *gradients)
        largest.append(record.elements)
    assert largest[1] == 2 * largest[0]


def test_the_operators_keep_their_promises() -> None:
    """Schema, fake tensors, autograd registration and tracing, by PyTorch's own checker."""
    q, k, v = inputs(1, 2, 1, 6, 4)
    t = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(attention_forward, ([q, k, v], t, None, 0.5, True, True, "blocked"))
    with torch.no_grad():
        output, entropy, lse = attention_forward([q, k, v], t, None, 0.5, True, True, "blocked")
        arguments = (
            output,
            entropy,
            [q.detach(), k.detach(), v.detach()],
            t,
            None,
            output,
            entropy,
            lse,
            0.5,
            True,
            "blocked",
        )
    torch.library.opcheck(attention_backward, tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments))


def test_compiles_without_graph_breaks_under_recomputation_and_autocast() -> None:
    q, k, v = inputs(2, 4, 2, 24, 8, torch.float32)
    t = torch.rand(4, 24, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output, entropy = entropy_attention(q, k, v, temperature=t.exp())
        return output, entropy

    def gradients(function) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        output, entropy = function(q, k, v, t)
        assert output.dtype == torch.bfloat16 and entropy.dtype == torch.float32
        return torch.autograd.grad(output.float().square().sum() + entropy.square().sum(), (q, k, v, t))

    expected = gradients(attend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    recomputed = gradients(lambda *x: checkpoint(compiled, *x, use_reentrant=False))
    for value, same in zip(recomputed, expected, strict=True):
        torch.testing.assert_close(value, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 3, 6, 4), "value": torch.zeros(1, 3, 6, 4)}, "multiple of the key's"),
        ({"value": torch.zeros(1, 4, 7, 4)}, r"expected \[B, N, T, H\]"),
        ({"query": torch.zeros(1, 4, 6, 4, dtype=torch.float64)}, "one floating-point type"),
        ({"temperature": torch.ones(3)}, "one per head"),
        ({"document_start": torch.zeros(1, 7, dtype=torch.int32)}, r"expected integers \[1, 6\]"),
        ({"implementation": "cuda"}, "expected 'auto'"),
        ({"scale": -1.0}, "must be positive"),
        ({"implementation": "triton", "dtype": torch.float64}, "use implementation='blocked'"),
    ],
)
def test_faults_are_named(change: dict, message: str) -> None:
    change = dict(change)
    dtype = change.pop("dtype", torch.float32)
    arguments = {name: torch.zeros(1, 4, 6, 4, dtype=dtype) for name in ("query", "key", "value")} | change
    with pytest.raises(ValueError, match=message):
        entropy_attention(**arguments)
