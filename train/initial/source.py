"""The model that a run starts from, whatever kind of folder holds it."""

from dataclasses import dataclass, field

from torch import Tensor

from model.config import ModelConfig

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
