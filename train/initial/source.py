"""The model that a run starts from, whatever kind of folder holds it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initialize import named_parameters
from model.normalized_weights import start_spectral_norms
from model.transformer import Transformer

Weights = dict[str, Tensor]
"""Whole parameters in float32 by global name, as in model/transformer.py."""


@dataclass(frozen=True)
class Source:
    """A whole model, read.

    Attributes:
        address: what was read: a folder.
        kind: "GPT-2" or "checkpoint".
        sha256: digest of everything that was read.
        model: resolved sizes and ingredients.
        weights: of the whole model. The vocabulary may be padded.
        tokenizer_sha256: of the tokenizer that it was trained with; None if the folder does not say.
        left_out: names of tensors of the folder that have no place in `model`.
    """

    address: str
    kind: str
    sha256: str
    model: ModelConfig
    weights: Weights = field(repr=False)
    tokenizer_sha256: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Rows of the word embedding."""
        return self.weights["embedding.word.weight"].shape[0]


@torch.no_grad()
def fill(model: Transformer, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a whole model its weights; power iteration of spectral norms begins anew on them.

    Args:
        model: in float32.
        weights: every parameter by global name.
    """
    parameters = dict(named_parameters(model))
    for name, whole in weights:
        parameters[name].copy_(whole)
    start_spectral_norms(model)
