"""Test that the parts of a compiled block keep their gradients: every autograd function of ours, and every operator.

The test at the top is the smallest program in which torch 2.11 loses a gradient. It shows which construct to avoid: a
`torch.autograd.Function` whose forward changes a tensor that it has made. Three libraries write such functions: we did
(an all-to-all into `empty_like`), megatron-core does (its gathers and scatters), and DeepSpeed does (`output += bias`
in the function that ZeRO-3 puts in the place of `torch.nn.functional.linear`).
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import model
import parallel
from model.cross_entropy import _LinearCrossEntropy
from model.distillation import _LinearDivergence
from model.entropy_attention import joint_entropy_attention
from model.entropy_attention.operators import _Attention
from model.transformer import _GradientOfBiases
from parallel.local_ranks import run_ranks
from parallel.sharding.regularizer import _Attach, _AttachPerHead

BIAS = torch.arange(6, dtype=torch.float64)
FIRST_SOUND_TORCH = (2, 13)
LAST_KNOWN_UNSOUND_TORCH = (2, 11)


class _ChangesItsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = torch.empty_like(x)
        result.copy_(x)  # a collective into it is the same
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _AddsToItsResult(torch.autograd.Function):
    """DeepSpeed's `LinearFunctionForZeroStage3`, reduced to what matters here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x * 1
        result += 1
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("function", [_ChangesItsResult, _AddsToItsResult])
def test_which_torch_loses_the_gradient_of_a_function_that_changes_its_result(function: Any) -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if LAST_KNOWN_UNSOUND_TORCH < version < FIRST_SOUND_TORCH:
        pytest.skip("not known of this version")
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)

    def loss(x: Tensor) -> Tensor:
        return function.apply(x @ weight).square().sum()

    (expected,) = torch.autograd.grad(loss(x), weight)
    result = compiled(loss)(x)
    (found,) = torch.autograd.grad(result, weight, allow_unused=True) if result.requires_grad else (None,)
    lost = found is None or not found.any()
    assert lost == (version <= LAST_KNOWN_UNSOUND_TORCH)
    assert lost or torch.equal(found, expected)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as one graph without generating code, which takes long: tracing is what loses gradients."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def our_functions() -> set[type]:
    """Return every autograd function that this project defines."""
    for package in (model, parallel):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("_triton") and "triton_" not in module.name:
                importlib.import_module(module.name)
    prefixes = ("model.", "parallel.")
    return {each for each in torch.autograd.Function.__subclasses__() if each.__module__.startswith(prefixes)}


def _biases(x: Tensor, weight: Tensor) -> Tensor:
    qkv = x @ weight.repeat(1, 6)  # [3, 2, N 3 H] with two heads of width four
    return _GradientOfBiases.apply(qkv, weight[:2], weight[2:], True).sin()


def _attention(x: Tensor, weight: Tensor) -> Tensor:
    qkv_TBN3H = (x @ weight.repeat(1, 6)).view(3, 2, 2, 3, 4)
    output, entropy = joint_entropy_attention(qkv_TBN3H, temperature=weight[0, :2].exp())
    return output.sum() + entropy.square().sum()


def _attached(x: Tensor, weight: Tensor) -> Tensor:
    return _Attach.apply((x @ weight).sin(), weight.square().sum(), 0.5)


MET_BY_THE_COMPILER: dict[Any, Callable[..., Tensor]] = {_GradientOfBiases: _biases, _Attention: _attention}
"""Each with a function of x [3, 2, 4] and a weight [4, 4] that uses it."""
OUTSIDE_OF_BLOCKS: dict[Any, Callable[..., Tensor] | None] = {
    _LinearCrossEntropy: None,  # fills gradients in its forward: never compile the head
    _LinearDivergence: None,  # as above
    _Attach: _attached,
    _AttachPerHead: None,  # waits for a collective in its backward
}


def test_every_function_is_listed_here() -> None:
    assert our_functions() == {*MET_BY_THE_COMPILER, *OUTSIDE_OF_BLOCKS}


USES = [use for use in (*MET_BY_THE_COMPILER.values(), *OUTSIDE_OF_BLOCKS.values()) if use is not None]


@pytest.mark.parametrize("use", USES)
def test_a_function_has_the_same_gradients_compiled(use: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    expected = _gradients(use, x, weight)
    found = _gradients(compiled(use), x, weight)
    assert all(gradient.norm() > 0 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _gradients(use: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    return torch.autograd.grad(use(*leaves).square().sum(), leaves)


HOW = {2: ("eager", "compiled"), 3: ("eager",)}
"""How each number of ranks runs the operators. A sum of more than two parts is another line of code."""
TAKES_ONE_X = ("take_positions", "take_features", "column_linear", "column_linear of five positions")
GIVES_ONE_RESULT = ("all_reduce", "row_linear", "row_linear of five positions")
"""Operators whose x, or whose result, is the same on every rank."""


def _operators(
    group: str, ranks: int
) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., list[Tensor]]]]:
    """Return each operator as a function of one rank's x [6, 2, 6] and weight [3, 6], and as one of all ranks'."""
    from parallel.sharding import collectives as c
    from parallel.sharding import products

    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack(xs).sum(0)

    def different(w: Tensor, parts: int, dim: int) -> Tensor:
        return torch.cat([w * factor for factor in range(1, parts + 1)], dim)

    return {
        "all_reduce": (lambda x, w: c.all_reduce(x, group), lambda xs, ws: [total(xs)] * ranks),
        "sum_both_ways": (lambda x, w: c.sum_both_ways(x, group), lambda xs, ws: [total(xs)] * ranks),
        "gather_positions": (lambda x, w: c.gather_positions(x, group), lambda xs, ws: [torch.cat(xs)] * ranks),
        "scatter_sum": (lambda x, w: c.scatter_sum(x, group), lambda xs, ws: list(total(xs).chunk(ranks))),
        "take_positions": (
            lambda x, w: c.take_positions(x, group),
            lambda xs, ws: [each.chunk(ranks)[rank] for rank, each in enumerate(xs)],
        ),
        "take_features": (
            lambda x, w: c.take_features(x, group),
            lambda xs, ws: [each.chunk(ranks, -1)[rank] for rank, each in enumerate(xs)],
        ),
        "all_to_all": (
            lambda x, w: c.all_to_all(x[:ranks], group),
            lambda xs, ws: [torch.stack([each[rank] for each in xs]) for rank in range(ranks)],
        ),
        "column_linear": (
            lambda x, w: products.column_linear(x, w, BIAS[:3], group, False),
            lambda xs, ws: [x @ w.t() + BIAS[:3] for x, w in zip(xs, ws, strict=True)],
        ),
        "column_linear of gathered positions": (
            lambda x, w: products.column_linear(x, w, BIAS[:3], group, True),
            lambda xs, ws: [torch.cat(xs) @ w.t() + BIAS[:3] for w in ws],
        ),
        "row_linear": (
            lambda x, w: products.row_linear(x, w, group, False),
            lambda xs, ws: [total([x @ w.t() for x, w in zip(xs, ws, strict=True)])] * ranks,
        ),
        "column_linear of five positions": (
            lambda x, w: products.column_linear(x[:5], w, None, group, False),
            lambda xs, ws: [x[:5] @ w.t() for x, w in zip(xs, ws, strict=True)],
        ),
        "row_linear of five positions": (
            lambda x, w: products.row_linear(x[:5], w, group, False),
            lambda xs, ws: [total([x[:5] @ w.t() for x, w in zip(xs, ws, strict=True)])] * ranks,
        ),
        "row_linear, scattered": (
            lambda x, w: products.row_linear(x, w, group, True),
            lambda xs, ws: list(total([x @ w.t() for x, w in zip(xs, ws, strict=True)]).chunk(ranks)),
        ),
        "heads_linear": (
            lambda x, w: products.heads_linear(x, different(w, 2, 0), BIAS, group),
            lambda xs, ws: [
                torch.cat([x @ different(w, 2, 0).t() + BIAS for x, w in zip(xs, ws, strict=True)]).chunk(ranks, -1)[
                    rank
                ]
                for rank in range(ranks)
            ],
        ),
        "positions_linear": (
            lambda x, w: products.positions_linear(x, different(w, ranks, 1), group)[0],
            lambda xs, ws: [
                torch.cat([each.chunk(ranks)[rank] for each in xs], -1) @ different(ws[rank], ranks, 1).t()
                for rank in range(ranks)
            ],
        ),
    }


def _on_rank(ranks: int) -> dict[tuple[str, str], Any]:
    """Return values and gradients of each operator on this rank; compiled too with two ranks, since it takes long."""
    from parallel.launch import initialize_distributed, rank
    from parallel.sharding.collectives import name_of

    initialize_distributed()
    found = {}
    for name, (operator, _) in _operators(name_of(torch.distributed.group.WORLD), ranks).items():
        functions = {"eager": operator, "compiled": compiled(operator)}
        for how in HOW[ranks]:
            leaves = [each.clone().requires_grad_() for each in _inputs(name, rank())]
            result = functions[how](*leaves)
            gradients = torch.autograd.grad(result, leaves, _incoming(name, rank(), result), allow_unused=True)
            found[name, how] = (result.detach(), gradients)
    return found


def _inputs(name: str, rank: int) -> list[Tensor]:
    draw = [torch.Generator().manual_seed(seed) for seed in (0 if name in TAKES_ONE_X else rank, 100 + rank)]
    sizes = ((6, 2, 6), (3, 6))
    return [
        torch.randn(size, generator=generator, dtype=torch.float64) for size, generator in zip(sizes, draw, strict=True)
    ]


def _incoming(name: str, rank: int, like: Tensor) -> Tensor:
    seed = 200 if name in GIVES_ONE_RESULT else 200 + rank
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


@pytest.mark.parametrize("ranks", HOW)
def test_operators_are_what_they_say_and_have_its_gradients_compiled_too(ranks: int) -> None:
    of_ranks = run_ranks(_on_rank, ranks, ranks)
    for name in _operators("", ranks):
        expected, gradients = _expected(name, ranks)
        for rank, how in ((rank, how) for rank in range(ranks) for how in HOW[ranks]):
            result, found = of_ranks[rank][name, how]
            torch.testing.assert_close(result, expected[rank], msg=lambda text, name=name: f"{name}: {text}")
            for one, other in zip(found, gradients[rank], strict=True):
                assert (one is None) == (other is None), (name, how)
                if one is not None:
                    torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def _expected(name: str, ranks: int) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
    """Compute the same by autograd on all ranks' inputs in one process.

    A replicated x is one tensor, whose gradient every rank gets.
    """
    of_ranks = [[each.requires_grad_() for each in _inputs(name, rank)] for rank in range(ranks)]
    if name in TAKES_ONE_X:
        of_ranks = [[of_ranks[0][0], weight] for _, weight in of_ranks]
    xs, ws = [of_rank[0] for of_rank in of_ranks], [of_rank[1] for of_rank in of_ranks]
    results = _operators("", ranks)[name][1](xs, ws)
    incoming = [_incoming(name, rank, result) for rank, result in enumerate(results)]
    if name in GIVES_ONE_RESULT:
        results, incoming = results[:1], incoming[:1]
    leaves = [leaf for of_rank in of_ranks for leaf in of_rank]
    found = torch.autograd.grad(results, leaves, incoming, allow_unused=True)
    pairs = [tuple(found[2 * rank : 2 * rank + 2]) for rank in range(ranks)]
    return [result.detach() for result in (results * ranks)[:ranks]], pairs
