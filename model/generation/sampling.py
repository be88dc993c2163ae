"""Choose the next token of each sequence from its logits.

The random numbers come in as arguments, so the same seed gives the same tokens on every device and in every batch.

Tensor names carry their shape: B sequences, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import explained


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The steps follow each other in this order, as in the transformers library."""

    temperature: float = explained(1.0, "Divides the logits before the softmax; 0 takes the most likely token.")
    top_k: int | None = explained(None, "Draw from the k most likely tokens only.")
    top_p: float = explained(
        1.0, "Draw from the fewest most likely tokens whose probabilities, after top_k, sum to at least p."
    )

    def faults(self) -> list[str]:
        """Return what is wrong with the values, one line each."""
        faults = []
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"temperature = {self.temperature} must not be negative; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            faults.append(f"top_k = {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p = {self.top_p} must lie in (0, 1]: it is a probability")
        return faults


GREEDY = Sampling(temperature=0.0)


def next_token(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Return the next token of each sequence, [B].

    The tokens that may be drawn lie on a line, the most likely first, each as long as its probability. The token at
    `uniform` of the line's length is taken (inverse transform sampling).

    Args:
        uniform_B: numbers in [0, 1), float64; a greedy choice does not use them.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    ordered_BV, token_BV = (logits_BV.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered_BV, token_BV = ordered_BV[:, : sampling.top_k], token_BV[:, : sampling.top_k]
    probability_BV = ordered_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV = probability_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    end_BV = probability_BV.cumsum(-1)
    drawn_B1 = torch.searchsorted(end_BV, uniform_B.unsqueeze(1) * end_BV[:, -1:], right=True)
    last_B1 = (probability_BV > 0).sum(-1, keepdim=True) - 1  # if the product was rounded up to the line's end
    return token_BV.gather(1, drawn_B1.minimum(last_B1)).squeeze(1)
