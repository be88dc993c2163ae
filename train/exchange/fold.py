"""Fold linear FFNs into the weights around them, so that softmax attention is all that is left of a layer.

Layer l computes x_l = B_l (x_(l-1) + O_l A_l(W_l x_(l-1))): attention reads the residual through W (queries, keys,
values) and writes to it through O; B = beta I + W_ffn / alpha is the FFN with its residual. Choose an invertible basis
S_l at each point between layers and hold y_l = S_l^-1 x_l instead of x_l. If S_l = B_l S_(l-1), then

    y_l = y_(l-1) + (S_(l-1)^-1 O_l) A_l((W_l S_(l-1)) y_(l-1)):

the FFN is gone, and W S and S^-1 O are as large as before. Biases b of the output and c of the FFN become one of the
output, S_(l-1)^-1 b + S_l^-1 c. One basis is free. With S_a = I at an anchor a, layers after
it have S_l = B_l ... B_(a+1), and layers before it S_l = (B_a ... B_(l+1))^-1. The embedding absorbs S_0^-1. A head
without a LayerNorm absorbs S_L; before one, S_L must be I.

Errors of rounding grow with the condition of S, which grows with the layers between it and the anchor. So the anchor is
in the middle where it may be. Where the condition would still pass a limit, a layer p keeps a matrix,
S_p^-1 B_p S_(p-1), and the bases on both sides of it are independent. docs/notes/folding.md measures all this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from train.exchange.plain import FfnKind, PlainWeights


@dataclass(frozen=True)
class Basis:
    """A basis S of the residual stream, [D, D] in float64; `matrix` holds S or its inverse, whichever is a product."""

    matrix: Tensor
    is_inverse: bool = False

    @property
    def condition(self) -> float:
        """Return the ratio of the largest to the smallest singular value."""
        return float(torch.linalg.cond(self.matrix))

    def read(self, weight: Tensor) -> Tensor:
        """Return W S for what reads the residual: [rows, D] -> [rows, D]."""
        if self.is_inverse:
            return torch.linalg.solve(self.matrix, weight.double(), left=False)
        return weight.double() @ self.matrix

    def write(self, weight: Tensor) -> Tensor:
        """Return S^-1 O for what writes to the residual: [D, columns] -> [D, columns]."""
        if self.is_inverse:
            return self.matrix @ weight.double()
        return torch.linalg.solve(self.matrix, weight.double())


@dataclass(frozen=True)
class Folding:
    """How the FFNs of a model are folded.

    Attributes:
        bases: at the L + 1 points between layers, the embedding and the head; None where it is I.
        kept: layer -> the matrix [D, D] that it keeps in place of its FFN, in float64.
        conditions: of the bases, 1 where they are I.
    """

    bases: list[Basis | None]
    kept: dict[int, Tensor]
    conditions: list[float]


class WithoutHeadTemperatures:
    """Reads the parameters of a network whose temperatures per head have become part of the queries.

    Those per position stay, and cost a multiplication for each element of the queries.

    Args:
        plain: of the model.
    """

    def __init__(self, plain: PlainWeights) -> None:
        self._plain = plain
        self.temperature = "none" if plain.temperature == "per_head" else plain.temperature

    def read(self, name: str) -> Tensor:
        """Return one parameter under its name in `PlainWeights`."""
        tensor = self._plain.read(name)
        layer, _, kind = name.partition(".attention.")
        if self._plain.temperature != "per_head" or kind not in ("query_key_value.weight", "query_bias"):
            return tensor
        t_N = self._plain.read(f"{layer}.attention.temperature").double()
        if kind == "query_bias":
            return (tensor.double() / t_N.unsqueeze(1)).to(tensor.dtype)
        qkv_N3HD = tensor.double().unflatten(0, (len(t_N), 3, -1)).clone()
        qkv_N3HD[:, 0] /= t_N.view(-1, 1, 1)
        return qkv_N3HD.flatten(0, 2).to(tensor.dtype)


class FoldedWeights:
    """Reads the parameters of the folded network under the names of `PlainWeights`.

    Args:
        plain: of the model.
        folding: from `fold`.
    """

    def __init__(self, plain: PlainWeights, folding: Folding) -> None:
        self.model, self._plain, self._folding = plain.model, plain, folding
        self._layers = WithoutHeadTemperatures(plain)
        self.temperature = self._layers.temperature
        bases = folding.bases
        self.is_tied = plain.is_tied and bases[0] is None and bases[-1] is None
        self.ffn_kinds: list[FfnKind] = [
            "matrix" if layer in folding.kept else "none" for layer in range(self.model.num_layers)
        ]

    def read(self, name: str) -> Tensor:
        """Return one parameter of the folded network."""
        bases = self._folding.bases
        if name == "head.weight":
            head = self._plain.read("embedding.word.weight" if self._plain.is_tied else name)
            return head if bases[-1] is None else bases[-1].read(head).to(head.dtype)
        if name.endswith("ffn.matrix.weight"):
            layer = name.split(".")[1]
            dtype = self._plain.read(f"layers.{layer}.attention.output.weight").dtype
            return self._folding.kept[int(layer)].to(dtype)
        tensor = self._layers.read(name)
        if name.startswith("embedding."):
            return tensor if bases[0] is None else bases[0].write(tensor.T).T.to(tensor.dtype)
        if not name.startswith("layers."):
            return tensor
        layer, kind = name.removeprefix("layers.").split(".", 1)
        basis, folded = bases[int(layer)], tensor.double()
        if kind == "attention.query_key_value.weight" and basis is not None:
            return basis.read(folded).to(tensor.dtype)
        if kind == "attention.output.weight" and basis is not None:
            return basis.write(folded).to(tensor.dtype)
        if kind == "attention.output_bias":
            folded = folded if basis is None else basis.write(folded.unsqueeze(1)).squeeze(1)
            folded = folded if int(layer) in self._folding.kept else folded + self._ffn_constant(int(layer))
            return folded.to(tensor.dtype)
        if kind == "ffn.bias":
            return self._ffn_constant(int(layer)).to(tensor.dtype)
        return tensor

    def _ffn_constant(self, layer: int) -> Tensor:
        """Return what the layer's FFN adds to every position, in the basis behind it."""
        constant, after = self._plain.ffn_constant(layer), self._folding.bases[layer + 1]
        return constant if after is None else after.write(constant.unsqueeze(1)).squeeze(1)


def reasons_against(model: ModelConfig) -> list[str]:
    """Return why the FFNs of a resolved model cannot be folded; none if they can."""
    reasons = []
    if model.norm == "layernorm":
        reasons.append(f"model.norm = {model.norm!r}: the LayerNorm before it is not linear")
    if model.activation != "identity":
        reasons.append(f"model.activation = {model.activation!r} is not linear")
    return reasons


def fold(products: Sequence[Tensor], head_is_linear: bool, limit: float) -> Folding:
    """Choose which layers keep a matrix, and the basis at every point, from the last layer to the first.

    Args:
        products: B of each layer, [D, D] in float64.
        head_is_linear: whether no LayerNorm stands before the head.
        limit: largest condition of a basis.
    """
    layers = len(products)
    bases: list[Basis | None] = [None] * (layers + 1)
    kept: list[int] = []
    stop, is_pinned = layers, not head_is_linear  # products[start:stop] are folded between two kept layers
    while stop > 0:
        start = stop
        while start > 0 and _worst(products, start - 1, stop, is_pinned) <= limit:
            start -= 1
        anchor = _anchor(start, stop, is_pinned)
        for point, basis in _segment(products, start, stop, anchor).items():
            bases[point] = basis
        if start > 0:
            kept.append(start - 1)
        stop, is_pinned = max(start - 1, 0), False
    matrices = {layer: _between(bases[layer], products[layer], bases[layer + 1]) for layer in kept}
    return Folding(bases, matrices, [1.0 if basis is None else basis.condition for basis in bases])


def _anchor(start: int, stop: int, is_pinned: bool) -> int:
    """Return the point whose basis is I: the last if what follows needs it, else the middle."""
    return stop if is_pinned else (start + stop) // 2


def _worst(products: Sequence[Tensor], start: int, stop: int, is_pinned: bool) -> float:
    """Return the larger condition of a segment's first and last basis."""
    anchor = _anchor(start, stop, is_pinned)
    ends = [_product(products[start:anchor]), _product(products[anchor:stop])]
    return max(float(torch.linalg.cond(end)) for end in ends if end is not None)


def _segment(products: Sequence[Tensor], start: int, stop: int, anchor: int) -> dict[int, Basis]:
    """Return the bases of the points start to stop but the anchor's."""
    before = {point: Basis(_product(products[point:anchor]), is_inverse=True) for point in range(start, anchor)}
    after = {point: Basis(_product(products[anchor:point])) for point in range(anchor + 1, stop + 1)}
    return before | after


def _product(products: Sequence[Tensor]) -> Tensor | None:
    """Return B_n ... B_1 of B_1 to B_n; None of none."""
    result = None
    for product in products:
        result = product if result is None else product @ result
    return result


def _between(before: Basis | None, product: Tensor, after: Basis | None) -> Tensor:
    """Return S_after^-1 B S_before."""
    product = product if before is None else before.read(product)
    return product if after is None else after.write(product)
