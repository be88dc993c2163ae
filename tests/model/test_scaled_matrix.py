"""The one matrix of a linear FFN sub-block: shards of it, its precision, and what its product keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.transformer import FeedForward, scaled_matrix


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight [24, 24], divisor and diagonal near 1, and a gradient of the matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight, grad = (torch.randn(24, 24, generator=generator).to(dtype) for _ in range(2))
    divisor, diagonal = (1 + 0.2 * torch.randn(1, generator=generator).to(dtype) for _ in range(2))
    return weight.requires_grad_(), divisor.requires_grad_(), diagonal.requires_grad_(), grad


def by_definition(weight: Tensor, divisor: Tensor, diagonal: Tensor) -> Tensor:
    return weight / divisor + diagonal * torch.eye(weight.shape[0], dtype=weight.dtype)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_columns_of_the_whole_and_their_gradients_add_up(shards: int) -> None:
    *leaves, grad = inputs(torch.float64)
    expected = by_definition(*leaves)
    expected_gradients = torch.autograd.grad(expected, leaves, grad)
    weight, divisor, diagonal = leaves
    width = 24 // shards
    parts = [
        scaled_matrix(columns, divisor, diagonal, shard * width)
        for shard, columns in enumerate(weight.split(width, dim=1))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-15, atol=0)
    gradients = torch.autograd.grad(torch.cat(parts, dim=1), leaves, grad)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_in_bf16_the_matrix_and_both_sums_are_rounded_once(seed: int) -> None:
    *leaves, grad = inputs(torch.bfloat16, seed)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    matrix, expected = scaled_matrix(*leaves), by_definition(*exact)
    gradients = torch.autograd.grad(matrix, leaves, grad)
    expected_gradients = torch.autograd.grad(expected, exact, grad.double())
    for found, true in zip((matrix, *gradients), (expected, *expected_gradients), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), true, rtol=1.001 * 2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_stay_as_they_are(dtype: torch.dtype) -> None:
    *leaves, _ = inputs(dtype)
    matrix = scaled_matrix(*leaves)
    assert matrix.dtype == dtype
    torch.testing.assert_close(matrix, by_definition(*leaves), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert scaled_matrix(leaves[0], None, None) is leaves[0]


@pytest.mark.parametrize("architecture", ["SM+ScFuFFN", "SM"])
def test_a_linear_sub_block_is_one_product_of_its_tokens(architecture: str) -> None:
    """Nothing else reads or writes a tensor as large as the activations, forward or backward."""
    config = ModelConfig(architecture=architecture, hidden_size=8, fused_ffn=True).resolved()
    ffn = FeedForward(config)
    x_TBD = torch.randn(50, 3, 8, requires_grad=True)
    with Large(x_TBD.numel()) as forward:
        y_TBD = ffn(x_TBD, x_TBD)
    grad_TBD = torch.ones_like(y_TBD)
    with Large(x_TBD.numel()) as backward:
        y_TBD.backward(grad_TBD)
    assert (forward.products, forward.others) == (1, [])
    assert (backward.products, backward.others) == (2, [])


class Large(TorchDispatchMode):
    """Counts matrix products of tensors of at least so many elements, and lists what else is done to such."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.products = elements, 0
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if not isinstance(result, Tensor) or max(x.numel() for x in (*given, result)) < self.elements:
            return result
        if func is torch.ops.aten.mm.default:
            self.products += 1
        elif result.data_ptr() not in [x.data_ptr() for x in given]:  # a view costs nothing
            self.others.append(str(func))
        return result
