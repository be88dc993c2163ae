"""Products with sharded matrices, whose exchange of activations hides behind the product itself.

A rank first computes what its peers wait for, or what needs nothing of them, and the rest while the parts travel
(`parallel.sharding.transport`). For p ranks, T positions, B sequences, and matrices of R rows or F columns:

    operator         tensor          ranks hold                       exchange
    column_linear    [T/p, B, D]     R/p rows of W                    gathers positions, then Y = X W^T
                     [T, B, D]       the same                         none; the gradient of X is summed
    row_linear       [T, B, F/p]     F/p columns of W                 sums Y = X W^T; each keeps its positions, or all
    heads_linear     [T/p, B, D]     W                                Y = X W^T, then positions for heads
    positions_linear [T, B, F/p]     W                                heads for positions, then Y = X W^T

The first two are tensor parallelism, with and without sequence parallelism, the others context parallelism. Gradients
mirror the exchanges. All are operators for the reasons given in `parallel.sharding.collectives`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.sharding.collectives import all_reduce, group_of, like, operator
from parallel.sharding.transport import Arrivals, but_own, transport


@operator
def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, gathers: bool) -> Tensor:
    """Compute Y = X W^T + b with the rows of W split over ranks: [T, B, D] -> [T, B, rows].

    The backward pass sums the gradient of X over ranks while it computes the gradient of W. Under sequence parallelism
    it gathers X again instead of keeping all positions.

    Args:
        bias: of this rank's rows; it gets no gradient.
        gathers: whether x holds only this rank's positions, [T / p, B, D] (sequence parallelism).
    """
    if not gathers:
        return torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    arrivals = _to_all(x, group)
    y = x.new_empty((x.shape[0] * _ranks(group), *x.shape[1:-1], weight.shape[0]))
    parts = y.chunk(_ranks(group))
    _multiply(x, weight.t(), parts[_rank(group)], bias)
    for peer in _peers(group):
        _multiply(arrivals.wait(peer), weight.t(), parts[peer], bias)
    return y


@operator
def _column_linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, gathers: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    grad = grad.contiguous()
    if not gathers and not _divides(grad, group):
        return all_reduce(grad @ weight, group), _of_weight(grad, x)
    again = _to_all(x.contiguous(), group) if gathers else None
    parts, shape = grad.chunk(_ranks(group)), (grad.shape[0] // _ranks(group), *x.shape[1:])
    arrivals = _send_products([(part, weight) for part in parts], shape, group)
    grad_weight = _of_weight(grad, x if again is None else _whole(again, x, group))
    own = parts[_rank(group)]
    if _ranks(group) == 2:  # the weight's gradient has hidden the arrival, so the product can add to it
        theirs = arrivals.wait(_peers(group)[0])
        total = torch.addmm(theirs.flatten(0, -2), own.flatten(0, -2), weight).view(shape)
    else:
        total = _total(arrivals, own, weight, group)
    return (total if gathers else _whole(_to_all(total, group), total, group)), grad_weight


@operator
def row_linear(x: Tensor, weight: Tensor, group: str, scatters: bool) -> Tensor:
    """Compute Y = sum over ranks of X_r W_r^T, the columns of W and the features of X split over them: -> [T, B, D].

    Args:
        scatters: whether each rank keeps only its positions, [T / p, B, D] (sequence parallelism).
    """
    x = x.contiguous()
    if not scatters and not _divides(x, group):
        return all_reduce(x @ weight.t(), group)
    parts, shape = x.chunk(_ranks(group)), (x.shape[0] // _ranks(group), *x.shape[1:-1], weight.shape[0])
    arrivals = _send_products([(part, weight.t()) for part in parts], shape, group)
    total = _total(arrivals, parts[_rank(group)], weight.t(), group)
    return total if scatters else _whole(_to_all(total, group), total, group)


@operator
def _row_linear_gradients(grad: Tensor, x: Tensor, weight: Tensor, group: str, scatters: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    grad = grad.contiguous()
    if not scatters:
        return grad @ weight, _of_weight(grad, x)
    arrivals = _to_all(grad, group)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = grad_x.chunk(_ranks(group))
    _multiply(grad, weight, parts[_rank(group)])
    for peer in _peers(group):
        _multiply(arrivals.wait(peer), weight, parts[peer])
    return grad_x, _of_weight(_whole(arrivals, grad, group), x)


@operator
def heads_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> Tensor:
    """Compute Y = X W^T + b and exchange heads for positions: [T / p, B, D] -> [T, B, R / p].

    Args:
        weight: [R, D], rows stacked head by head; rank r gets the r-th part of the heads.
        bias: [R], or None; it gets no gradient.
    """
    x, ranks = x.contiguous(), _ranks(group)
    weights, biases = weight.chunk(ranks), [None] * ranks if bias is None else bias.chunk(ranks)
    shape = (*x.shape[:-1], weight.shape[0] // ranks)
    arrivals = _send_products([(x, each.t()) for each in weights], shape, group, biases)
    own = _rank(group)
    _multiply(x, weights[own].t(), arrivals.received[own], biases[own])
    return arrivals.wait_all().flatten(0, 1)


@operator
def _heads_linear_gradients(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    ranks, own = _ranks(group), _rank(group)
    parts, weights = grad.contiguous().chunk(ranks), weight.chunk(ranks)
    arrivals = _send(parts, group)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    of_weights = grad_weight.chunk(ranks)
    grad_x = parts[own].flatten(0, -2) @ weights[own]
    torch.mm(parts[own].flatten(0, -2).t(), x.flatten(0, -2), out=of_weights[own])
    for peer in _peers(group):
        part = arrivals.wait(peer).flatten(0, -2)
        grad_x.addmm_(part, weights[peer])
        torch.mm(part.t(), x.flatten(0, -2), out=of_weights[peer])
    return grad_x.view(x.shape), grad_weight


@operator
def positions_linear(x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Exchange positions for heads and compute Y = X W^T: [T, B, F / p] -> [T / p, B, D].

    Args:
        weight: [D, F], columns stacked head by head; rank r has the r-th part of the heads.

    Returns:
        Y, and its own positions of X with the features of each rank, [p, T / p, B, F / p], for the backward pass.
    """
    ranks, own = _ranks(group), _rank(group)
    parts, weights = x.contiguous().chunk(ranks), weight.chunk(ranks, dim=1)
    arrivals = _send(parts, group)
    y = parts[own].flatten(0, -2) @ weights[own].t()
    for peer in _peers(group):
        y.addmm_(arrivals.wait(peer).flatten(0, -2), weights[peer].t())
    kept = arrivals.received
    kept[own].copy_(parts[own])
    return y.view(*kept.shape[1:-1], weight.shape[0]), kept


@operator
def _positions_linear_gradients(grad: Tensor, kept: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    grad, ranks, own = grad.contiguous(), _ranks(group), _rank(group)
    weights = weight.chunk(ranks, dim=1)
    arrivals = _send_products([(grad, each) for each in weights], kept.shape[1:], group)
    _multiply(grad, weights[own], arrivals.received[own])
    grad_weight = torch.cat([_of_weight(grad, part) for part in kept], dim=1)
    return arrivals.wait_all().flatten(0, 1), grad_weight


def _send_products(factors: list[tuple[Tensor, Tensor]], shape: Any, group: str, biases: Any = None) -> Arrivals:
    """Compute for each peer the product of its pair of matrices, of `shape`, and send it."""
    moves = transport(group_of(group))
    offered = moves.outgoing(shape, factors[0][0])
    for peer in _peers(group):
        into = offered[peer]
        assert into is not None
        _multiply(*factors[peer], into, None if biases is None else biases[peer])
    return moves.start(offered)


def _send(parts: Sequence[Tensor], group: str) -> Arrivals:
    """Send each peer its part."""
    ranks = group_of(group)
    return transport(ranks).start(but_own(parts, ranks))


def _to_all(x: Tensor, group: str) -> Arrivals:
    """Send a tensor to all peers."""
    return _send([x] * _ranks(group), group)


def _whole(arrivals: Arrivals, own: Tensor, group: str) -> Tensor:
    """Return the positions of all ranks, once they are here: [T / p, ...] -> [T, ...]."""
    arrivals.received[_rank(group)].copy_(own)
    return arrivals.wait_all().flatten(0, 1)


def _total(arrivals: Arrivals, own: Tensor, matrix: Tensor, group: str) -> Tensor:
    """Return the sum of this rank's product and of what arrives; the product hides the arrival."""
    _multiply(own, matrix, arrivals.received[_rank(group)])
    terms = arrivals.wait_all()
    return terms[0] + terms[1] if len(terms) == 2 else terms.sum(0)  # a sum's kernel takes twice as long


def _multiply(x: Tensor, matrix: Tensor, into: Tensor, bias: Tensor | None = None) -> None:
    rows, result = x.flatten(0, -2), into.view(-1, into.shape[-1])
    if bias is None:
        torch.mm(rows, matrix, out=result)
    else:
        torch.addmm(bias, rows, matrix, out=result)


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _divides(x: Tensor, group: str) -> bool:
    return x.shape[0] % _ranks(group) == 0


def _ranks(group: str) -> int:
    return group_of(group).size()


def _rank(group: str) -> int:
    return group_of(group).rank()


def _peers(group: str) -> list[int]:
    """Return the other ranks in the order in which their parts arrive."""
    return [(_rank(group) + step) % _ranks(group) for step in range(1, _ranks(group))]


@column_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, gathers: bool) -> Tensor:
    return x.new_empty((x.shape[0] * (_ranks(group) if gathers else 1), *x.shape[1:-1], weight.shape[0]))


@row_linear.register_fake
def _(x: Tensor, weight: Tensor, group: str, scatters: bool) -> Tensor:
    return x.new_empty((x.shape[0] // (_ranks(group) if scatters else 1), *x.shape[1:-1], weight.shape[0]))


@heads_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> Tensor:
    ranks = _ranks(group)
    return x.new_empty((x.shape[0] * ranks, *x.shape[1:-1], weight.shape[0] // ranks))


@positions_linear.register_fake
def _(x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    ranks, shape = _ranks(group), (x.shape[0] // _ranks(group), *x.shape[1:])
    return x.new_empty((*shape[:-1], weight.shape[0])), x.new_empty((ranks, *shape))


@_column_linear_gradients.register_fake
@_row_linear_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str, flag: bool) -> tuple[Tensor, Tensor]:
    return like(x, group), like(weight, group)


@_heads_linear_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return like(x, group), like(weight, group)


@_positions_linear_gradients.register_fake
def _(grad: Tensor, kept: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return kept.new_empty((kept.shape[0] * kept.shape[1], *kept.shape[2:])), like(weight, group)


def _keep_column(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.group, ctx.gathers = inputs
    ctx.save_for_backward(x, weight)


def _keep_row(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.group, ctx.scatters = inputs
    ctx.save_for_backward(x, weight)


def _keep_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.group = inputs
    ctx.save_for_backward(x, weight)


def _keep_positions(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, weight, ctx.group = inputs
    ctx.save_for_backward(output[1], weight)


def _column_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_column_linear_gradients(grad, *ctx.saved_tensors, ctx.group, ctx.gathers), None, None, None


def _row_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_row_linear_gradients(grad, *ctx.saved_tensors, ctx.group, ctx.scatters), None, None


def _heads_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_heads_linear_gradients(grad, *ctx.saved_tensors, ctx.group), None, None


def _positions_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *_positions_linear_gradients(grad, *ctx.saved_tensors, ctx.group), None


column_linear.register_autograd(_column_backward, setup_context=_keep_column)
row_linear.register_autograd(_row_backward, setup_context=_keep_row)
heads_linear.register_autograd(_heads_backward, setup_context=_keep_heads)
positions_linear.register_autograd(_positions_backward, setup_context=_keep_positions)
