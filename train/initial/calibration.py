"""Measures on data what a conversion needs: the scales of norms, and the best linear map of each FFN.

One pass of the source model over training data in one process. Nothing of it is trained.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Block, Transformer
from train.initial.conversion import LayerMeasure
from train.initial.source import Source, fill

TOKENS_PER_FEATURE = 64
"""Tokens that the pass reads for each feature of the model's width. A linear map has as many unknowns in each row."""
RIDGE = 1e-6
"""Added to the covariance's diagonal, as a share of its mean: a norm's outputs do not span all directions."""


def tokens_wanted(model: ModelConfig) -> int:
    """Return how many tokens the pass should read."""
    return TOKENS_PER_FEATURE * model.hidden_size


class _Moments:
    """Sums over tokens of x, y, x x^T and y x^T, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.x, self.y = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2))
        self.xx, self.yx = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = (each.detach().flatten(0, -2).double() for each in (x, y))
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.yx += y.T @ x

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """Return M and c of the least squares fit y = M x + c."""
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        crossed = self.yx / self.count - torch.outer(y, x)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)
        matrix = torch.linalg.solve(covariance, crossed.T).T
        return matrix.cpu(), (y - matrix @ x).cpu()


class _LayerPass:
    """Collects what one layer shows during the pass."""

    def __init__(self, block: Block, width: int, device: torch.device) -> None:
        self.inverse = {"attention_norm": [0.0, 0], "ffn_norm": [0.0, 0]}
        for name in self.inverse:
            norm = block.get_submodule(name)
            if isinstance(norm, nn.LayerNorm):
                norm.register_forward_pre_hook(self._scale_hook(name, norm.eps))
        self.moments = _Moments(width, device) if block.ffn.up is not None else None
        if block.ffn.up is not None and block.ffn.down is not None:
            block.ffn.up.register_forward_hook(self._entered)
            block.ffn.down.register_forward_hook(self._left)

    def _scale_hook(self, name: str, epsilon: float) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inverse = (inputs[0].double().var(dim=-1, correction=0) + epsilon).rsqrt()
            self.inverse[name][0] += float(inverse.sum())
            self.inverse[name][1] += inverse.numel()

        return hook

    def _entered(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.x = inputs[0]

    def _left(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert self.moments is not None
        self.moments.add(self.x, output)

    def measured(self) -> LayerMeasure:
        scales = [count / total if count else 1.0 for total, count in self.inverse.values()]
        matrix, constant = (None, None) if self.moments is None else self.moments.linear_map()
        return LayerMeasure(scales[0], scales[1], matrix, constant)


@torch.no_grad()
def measure(source: Source, batches_TB: Iterable[Tensor], device: torch.device) -> list[LayerMeasure]:
    """Run the source model over token batches and return what its layers show.

    Args:
        source: the whole model.
        batches_TB: tokens [T, B], T at most the source's.
        device: to compute on.
    """
    with torch.device(device):
        model = Transformer(source.model, source.vocab_size)
    fill(model, source.weights.items())
    model.eval()
    layers = [_LayerPass(block, source.model.hidden_size, device) for block in model.layers.values()]
    count = 0
    for tokens_TB in batches_TB:
        model.hidden_states(tokens_TB.to(device))
        count += tokens_TB.numel()
    assert count, "no tokens to measure on"
    return [layer.measured() for layer in layers]
