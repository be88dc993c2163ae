"""Small models to start from, with random norms and biases too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.initialize import named_parameters
from model.transformer import Transformer
from train.initial.source import Source, Weights

VOCAB_SIZE = 50
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}


def config(architecture: str, **ingredients: Any) -> ModelConfig:
    return ModelConfig(**{"architecture": architecture, **SIZES, **ingredients}).resolved()


def source(model: ModelConfig, **changes: Any) -> Source:
    """Return a source with random weights; `changes` are attributes of `Source`."""
    transformer = Transformer(model, VOCAB_SIZE)
    noise = torch.Generator().manual_seed(0)
    weights = {
        name: parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=noise)
        for name, parameter in named_parameters(transformer)
    }
    return Source(
        **{"address": "made", "kind": "checkpoint", "sha256": "0", "model": model, "weights": weights, **changes}
    )


def logits(
    model: ModelConfig, weights: Weights, tokens_TB: Tensor, change: Callable[[Transformer], None] = lambda _: None
) -> Tensor:
    """Return logits in float64, after `change` was made to the model. A parameter without a weight is 0."""
    transformer = Transformer(model, VOCAB_SIZE).double()
    with torch.no_grad():
        for name, parameter in named_parameters(transformer):
            parameter.copy_(weights.get(name, torch.zeros_like(parameter)))
        change(transformer)
        return transformer(tokens_TB)[0]


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(VOCAB_SIZE, (SIZES["seq_length"], batch), generator=torch.Generator().manual_seed(1))


class FixedNorm(nn.Module):
    """A LayerNorm whose standard deviation is a constant."""

    def __init__(self, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.scale * self.norm.weight + self.norm.bias
