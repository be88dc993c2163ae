"""Weight and spectral normalization as reparametrizations of a linear layer's weight.

A weight [rows, columns] may hold several matrices stacked head by head: query, key and value of one head, then of the
next. `slots` is their number per head, and the first `normalized` of them are normalized.

Norms are sums over all elements. For a matrix sharded by rows or columns, the caller passes `sum_over_shards`, whose
forward and backward both sum over the shards. The result is then exact.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SumOverShards = Callable[[Tensor], Tensor]


def _unsharded(partial: Tensor) -> Tensor:
    return partial


class WeightNormalization(nn.Module):
    """W = gain * V / ||V||, one norm and one learnable gain for each output row [standard form].

    V: [rows, columns], gain: [rows]. `sum_over_column_shards` is needed only where columns are split.
    """

    def __init__(
        self,
        rows: int,
        *,
        slots: int = 1,
        normalized: int = 1,
        head_width: int = 1,
        sum_over_column_shards: SumOverShards = _unsharded,
    ) -> None:
        super().__init__()
        self.slots, self.normalized, self.head_width = slots, normalized, head_width
        self.sum_over_column_shards = sum_over_column_shards
        self.gain = nn.Parameter(torch.empty(rows))

    def forward(self, weight: Tensor) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        norm = self.sum_over_column_shards(weight.to(exact).square().sum(dim=1)).sqrt()
        factor = (self.gain.to(exact) / norm).to(weight.dtype)
        if self.normalized < self.slots:
            slot = torch.arange(weight.shape[0], device=weight.device) // self.head_width % self.slots
            factor = torch.where(slot < self.normalized, factor, torch.ones_like(factor))
        return weight * factor.unsqueeze(1)


class SpectralNormalization(nn.Module):
    """W = V / sigma_1(V), with sigma_1 = u^T V v and u, v from power iteration (Miyato et al. 2018).

    With `has_gain` it is W = gamma V / sigma_1(V), with one learned gamma for each normalized matrix: [normalized]
    (sigmaReparam, Zhai et al. 2023, arXiv 2303.06296).

    The iteration advances in `update`, once an optimizer step, and not in `forward`: gradient accumulation and
    activation recomputation then see the same sigma. `sum_over_row_shards` or `sum_over_column_shards` is needed where
    V is split.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        slots: int = 1,
        normalized: int = 1,
        head_width: int = 1,
        has_gain: bool = False,
        sum_over_row_shards: SumOverShards = _unsharded,
        sum_over_column_shards: SumOverShards = _unsharded,
    ) -> None:
        super().__init__()
        self.slots, self.normalized, self.head_width = slots, normalized, head_width
        self.sum_over_row_shards, self.sum_over_column_shards = sum_over_row_shards, sum_over_column_shards
        self.gamma = nn.Parameter(torch.empty(normalized)) if has_gain else None
        self.register_buffer("left", torch.empty(normalized, rows // slots))
        self.register_buffer("right", torch.empty(normalized, columns))

    def matrices(self, weight: Tensor) -> Tensor:
        """The normalized matrices of a stacked weight: [normalized, rows / slots, columns]."""
        if self.slots == 1:
            return weight.unsqueeze(0)
        heads = weight.view(-1, self.slots, self.head_width, weight.shape[1])
        return heads[:, : self.normalized].transpose(0, 1).reshape(self.normalized, -1, weight.shape[1])

    def sigma(self, weight: Tensor) -> Tensor:
        """The largest singular value of each normalized matrix: [normalized], in float32 or wider."""
        matrices = self.matrices(weight).to(torch.promote_types(weight.dtype, torch.float32))
        left, right = self.left.to(matrices), self.right.to(matrices)
        return self._sum_all(torch.einsum("pr,prc,pc->p", left, matrices, right))

    def forward(self, weight: Tensor) -> Tensor:
        inverse = 1.0 / self.sigma(weight)
        factor = (inverse if self.gamma is None else self.gamma * inverse).to(weight.dtype)
        if self.slots == 1:
            return weight * factor
        factor = torch.cat([factor, factor.new_ones(self.slots - self.normalized)])
        return (weight.view(-1, self.slots, self.head_width, weight.shape[1]) * factor.view(1, -1, 1, 1)).view_as(
            weight
        )

    @torch.no_grad()
    def update(self, weight: Tensor, iterations: int = 1) -> None:
        """Advances u and v by `iterations` rounds of power iteration on V, the unnormalized `weight`."""
        matrices = self.matrices(weight).to(torch.promote_types(weight.dtype, torch.float32))
        left = self.left.to(matrices)
        for _ in range(iterations):
            right = self.sum_over_row_shards(torch.einsum("prc,pr->pc", matrices, left))
            right = right / self.sum_over_column_shards(right.square().sum(1, keepdim=True)).sqrt()
            left = self.sum_over_column_shards(torch.einsum("prc,pc->pr", matrices, right))
            left = left / self.sum_over_row_shards(left.square().sum(1, keepdim=True)).sqrt()
        self.left.copy_(left)
        self.right.copy_(right)

    def _sum_all(self, partial: Tensor) -> Tensor:
        return self.sum_over_row_shards(self.sum_over_column_shards(partial))


ITERATIONS_AT_START = 30
"""Rounds of power iteration from an arbitrary start."""


@torch.no_grad()
def start_spectral_norms(module: nn.Module) -> None:
    """Find u and v of every spectrally normalized weight below `module` anew, without earlier ones."""
    for child in module.modules():
        if isinstance(child, SpectralNormalization):
            child.left.fill_(1.0)  # any start with a component along the first singular vector
    update_spectral_norms(module, ITERATIONS_AT_START)


def update_spectral_norms(module: nn.Module, iterations: int = 1) -> None:
    """Advances the power iteration of every spectrally normalized weight below `module`; call once an optimizer
    step.
    """
    for child in module.modules():
        parametrizations = getattr(child, "parametrizations", None)
        if parametrizations is not None and "weight" in parametrizations:
            for normalization in parametrizations["weight"]:
                if isinstance(normalization, SpectralNormalization):
                    normalization.update(parametrizations["weight"].original, iterations)
