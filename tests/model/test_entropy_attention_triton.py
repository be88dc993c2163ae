"""The Triton kernels of attention against float64."""

import pytest
import torch

from model.entropy_attention import entropy_attention, joint_entropy_attention
from tests.model.interpreter import (
    DEVICE,
    HAS_CUDA,
    needs_kernels,
    run_interpreted,
    starts_the_interpreter,
)
from tests.model.test_entropy_attention import EXTREMES, document_starts, extreme_errors, relative_error


@starts_the_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def errors(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool = True,
    temperature: str = "none",
    with_entropy: bool = True,
    tokens_first: bool = False,
    boundaries: list[int] | None = None,
) -> list[float]:
    """Relative errors against float64: output, entropy, gradients of query, key, value and temperature."""
    batch, heads, key_heads, tokens, width = shape
    generator = torch.Generator().manual_seed(tokens * width + heads)

    def tensor(heads: int) -> torch.Tensor:
        x = torch.randn(tokens, batch, heads, width, generator=generator).to(DEVICE, dtype).permute(1, 2, 0, 3)
        return x if tokens_first else x.contiguous()

    leaves = [tensor(heads), tensor(key_heads), tensor(key_heads)]
    if temperature != "none":
        t = torch.rand(heads, tokens, generator=generator).to(DEVICE) + 0.5
        t[0] *= -1  # the raw form may cross zero
        leaves.append(t if temperature == "per_position" else t[:, 0].contiguous())
    grad_output, grad_entropy = tensor(heads), torch.randn(batch, heads, tokens, generator=generator).to(DEVICE)
    starts = None if boundaries is None else document_starts(batch, tokens, boundaries).to(DEVICE)
    results = []
    for implementation in ("triton", "reference"):
        exact = implementation == "reference"
        used = [(x.double() if exact else x.detach()).requires_grad_() for x in leaves]
        output, entropy = entropy_attention(
            *used[:3],
            temperature=used[3] if len(used) > 3 else None,
            document_start=starts,
            causal=causal,
            return_entropy=with_entropy,
            implementation=implementation,
        )
        loss = (output * grad_output).sum()
        if entropy is not None:
            loss = loss + (entropy * grad_entropy).sum()
        results.append([output] + [entropy] * with_entropy + list(torch.autograd.grad(loss, used)))
    return [relative_error(x, y) for x, y in zip(*results, strict=True)]


@needs_kernels
@pytest.mark.parametrize("temperature", ["none", "per_head", "per_position"])
@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((2, 4, 2, 37, 32), True),  # grouped heads, a ragged end
        ((1, 2, 2, 70, 20), True),  # a width that is no power of two
        ((1, 3, 1, 45, 32), False),
        ((1, 2, 2, 64, 33), True),  # a width that no 16-byte row holds
    ],
)
def test_float32(shape: tuple[int, int, int, int, int], causal: bool, temperature: str) -> None:
    found = errors(shape, torch.float32, causal=causal, temperature=temperature, tokens_first=True)
    assert max(found) < 5e-6, found


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "width", "causal"), [(200, 64, True), (130, 128, True), (100, 64, False), (50, 64, True)]
)
def test_half_precision(tokens: int, width: int, causal: bool) -> None:
    dtype = torch.bfloat16 if HAS_CUDA else torch.float16  # the interpreter computes bfloat16 wrongly
    found = errors((1, 4, 2, tokens, width), dtype, causal=causal, temperature="per_position")
    assert found[1] < 1e-3 and max(found) < 1e-2, found


@needs_kernels
def test_the_gradient_of_a_temperature_survives_a_rounded_output() -> None:
    """It sums to little over a head's rows, so the output's rounding to 16 bits must not enter."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert errors((2, 2, 1, 96, 64), dtype, causal=False, temperature="per_head")[-1] < 1e-4


@needs_kernels
@pytest.mark.parametrize(
    ("boundaries", "causal", "temperature"),
    [([5, 40, 63, 64], True, "per_position"), ([32, 70], True, "none"), ([97], False, "per_head"), ([], True, "none")],
)
def test_documents(boundaries: list[int], causal: bool, temperature: str) -> None:
    found = errors((2, 4, 2, 100, 32), torch.float32, causal=causal, temperature=temperature, boundaries=boundaries)
    assert max(found) < 5e-6, found
    dtype = torch.bfloat16 if HAS_CUDA else torch.float16
    found = errors((2, 2, 2, 200, 64), dtype, causal=causal, temperature=temperature, boundaries=boundaries)
    assert found[1] < 1e-3 and max(found) < 1e-2, found


@needs_kernels
def test_without_entropy() -> None:
    assert max(errors((1, 2, 2, 80, 32), torch.float32, with_entropy=False)) < 5e-6


@needs_kernels
@pytest.mark.parametrize("implementation_scale", [1.0, 1e3])
def test_one_key_has_entropy_zero(implementation_scale: float) -> None:
    q = torch.randn(2, 2, 40, 32, device=DEVICE) * implementation_scale
    _, entropy = entropy_attention(q, q, q, implementation="triton")
    assert entropy is not None and (entropy[:, :, 0] == 0).all()
    for causal in (True, False):
        one = q[:, :, :1]
        output, entropy = entropy_attention(one, one, one, causal=causal, implementation="triton")
        assert entropy is not None and (entropy == 0).all()
        torch.testing.assert_close(output, one)


@needs_kernels
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits_are_no_worse_than_plain_autograd(case: str) -> None:
    ours, plain = extreme_errors(case, "triton", DEVICE)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)


@needs_kernels
@pytest.mark.parametrize("tokens", [96, 160])
def test_enormous_scores_are_finite_and_one_hot(tokens: int) -> None:
    """Scores near 1e16, as residuals of 1e7 give: the largest takes all, and nothing overflows."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, tokens, 128, generator=generator).to(DEVICE, dtype) for _ in range(3))
    q, k = (q * 1e7).requires_grad_(), (k * 1e7).requires_grad_()
    t = torch.full((2, tokens), 0.01, device=DEVICE, requires_grad=True)
    for temperature in (None, t):
        output, entropy = entropy_attention(q, k, v, temperature=temperature, implementation="triton")
        expected, _ = entropy_attention(
            q.double(), k.double(), v.double(), temperature=temperature, implementation="reference"
        )
        torch.testing.assert_close(output, expected.to(dtype))
        assert (entropy == 0).all()
        gradients = torch.autograd.grad(output.sum() + entropy.sum(), (q, k))
        assert all(gradient.isfinite().all() for gradient in gradients)


@needs_kernels
def test_results_keep_the_memory_order_of_their_inputs() -> None:
    joint = torch.randn(48, 2, 4, 3, 32, device=DEVICE, requires_grad=True)
    q, k, v = (x.permute(1, 2, 0, 3) for x in joint.unbind(3))
    output, entropy = entropy_attention(q, k, v, implementation="triton")
    assert output.permute(2, 0, 1, 3).is_contiguous()
    gradients = torch.autograd.grad(output.sum() + entropy.sum(), (q, k, v))
    assert all(x.permute(2, 0, 1, 3).is_contiguous() for x in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 128, 1000])
def test_every_width_and_type_on_the_device(tokens: int, width: int, dtype: torch.dtype) -> None:
    for causal, temperature in ((True, "none"), (True, "per_position"), (False, "per_head")):
        found = errors((2, 4, 2, tokens, width), dtype, causal=causal, temperature=temperature, tokens_first=True)
        if tokens == 1:  # gradients through one key are zero: only output and entropy mean something
            found = found[:2]
        limit = 5e-6 if dtype == torch.float32 else 1e-2
        assert max(found) < limit and found[1] < (5e-6 if dtype == torch.float32 else 1e-3), found


@pytest.mark.gpu
def test_a_joint_projection_on_the_device() -> None:
    joint = torch.randn(200, 3, 4, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.rand(4, 200, device="cuda").add(0.5).requires_grad_()

    def attend(joint: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output, entropy = joint_entropy_attention(joint * 1.0, temperature=t)
        return output.float().square().sum() + entropy.square().sum()

    q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in joint.unbind(3))
    output, entropy = entropy_attention(q, k, v, temperature=t)
    expected = torch.autograd.grad(output.float().square().sum() + entropy.square().sum(), (joint, t))
    for function in (attend, torch.compile(attend, fullgraph=True)):
        found = torch.autograd.grad(function(joint, t), (joint, t))
        assert all(relative_error(x, y) < 1e-3 for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_the_backward_is_deterministic() -> None:
    q, k, v = (torch.randn(4, 8, 1500, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    t = torch.rand(8, 1500, device="cuda").add(0.5).requires_grad_()
    output, entropy = entropy_attention(q, k, v, temperature=t)
    loss = output.float().square().sum() + entropy.square().sum()
    first = torch.autograd.grad(loss, (q, k, v, t), retain_graph=True)
    for _ in range(5):
        for x, y in zip(torch.autograd.grad(loss, (q, k, v, t), retain_graph=True), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_memory_is_linear_in_the_sequence() -> None:
    peaks = []
    for tokens in (4096, 8192):
        q, k, v = (
            torch.randn(1, 4, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        torch.cuda.reset_peak_memory_stats()
        output, entropy = entropy_attention(q, k, v)
        (output.sum() + entropy.sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del q, k, v, output, entropy
    assert peaks[1] < 2.1 * peaks[0]


@pytest.mark.gpu
def test_compiles_and_recomputes_on_the_device() -> None:
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", requires_grad=True) for _ in range(3))
    t = torch.rand(4, 256, device="cuda").add(0.5).requires_grad_()

    def attend(q, k, v, t):  # type: ignore[no-untyped-def]
        with torch.autocast("cuda", torch.bfloat16):
            output, entropy = entropy_attention(q * 1.0, k, v, temperature=t)
        return output.float() * 2, entropy

    def gradients(function):  # type: ignore[no-untyped-def]
        output, entropy = function(q, k, v, t)
        return torch.autograd.grad(output.square().sum() + entropy.square().sum(), (q, k, v, t))

    compiled = torch.compile(attend, fullgraph=True)
    expected = gradients(attend)
    found = gradients(lambda *x: torch.utils.checkpoint.checkpoint(compiled, *x, use_reentrant=False))
    assert all(relative_error(x, y) < 1e-2 for x, y in zip(found, expected, strict=True))
