"""TaperNorm: a LayerNorm that becomes a fixed affine map while a network trains (arXiv 2602.10408).

With the mean and the standard deviation sigma of one token's features (sigma^2 includes LayerNorm's epsilon):

    y = w (x - mean(x)) (g / sigma(x) + (1 - g) s) + b

One gate g serves all norms. At g = 1 this is LayerNorm. Training lowers g to 0 over a window of steps
(`train.config.schedule.norm_gate`). What is left is the affine map y = s w (x - mean(x)) + b. It folds into the
matrices that read y, so private inference has no norm to compute.

s is a number. It is measured once, when the gate begins to fall, and stays as it is. Of all s it brings s (x - mean)
nearest to (x - mean) / sigma, in the least squares over the tokens of one step:

    s = sum v / sigma  /  sum v,      v = mean((x - mean)^2) = sigma^2 - epsilon

The paper weights features by w^2 in that fit, takes running means over steps, and trains a gain of the fixed map apart
from w. Here both share w and b: they learn before, during and after the window. The norm after the last block stays a
LayerNorm. It anchors the scale of the logits, which otherwise grows, as the paper shows.

Freezing the scale of trained norms one after another is an alternative: arXiv 2507.02559.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class TaperNorm(nn.LayerNorm):
    """A LayerNorm with a gate, [..., D] -> [..., D].

    Attributes:
        gate: g, a float32 scalar on the model's device. `share_gate` makes all norms of a model hold the same tensor,
            so that one write reaches compiled blocks and replayed CUDA graphs.
        scale: s, [1]; 0 until it is calibrated.
    """

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = torch.ones(())
        self.register_buffer("scale", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        centered = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = centered - centered.mean(-1, keepdim=True)
        inverse = (centered.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        factor = self.gate * inverse + (1 - self.gate) * self.scale.to(inverse.dtype)
        return (centered * factor * self.weight + self.bias).to(x.dtype)

    def moments(self, x: Tensor) -> Tensor:
        """Return the two sums over tokens whose ratio is s: of v / sigma and of v, [2] in float64."""
        exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        v = exact.var(-1, unbiased=False)
        return torch.stack([(v * (v + self.eps).rsqrt()).sum(dtype=torch.float64), v.sum(dtype=torch.float64)])


def taper_norms(model: nn.Module) -> list[TaperNorm]:
    """Return the tapered norms of a model in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, TaperNorm)]


def share_gate(norms: Iterable[TaperNorm], device: torch.device) -> None:
    """Give norms one gate, which is 1."""
    gate = torch.ones((), device=device)
    for norm in norms:
        norm.gate = gate


def set_gate(norms: Iterable[TaperNorm], value: float) -> None:
    """Set the gate of norms, in place."""
    for gate in {norm.gate for norm in norms}:
        gate.fill_(value)
