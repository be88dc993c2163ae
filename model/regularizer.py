"""The entropy regularizer: holds every head's attention entropy near a learned threshold (arXiv 2501.03489, Algorithm
1).

    delta   = entropy - theta ln T            (nats; ln T, not the causal maximum)
    penalty = delta^2  where |delta| > margin ln T, else 0
    loss    = CE + coefficient * mean over layers, mean over heads of the penalty

The published code and the published algorithm take delta at different granularities, so this is a choice:

- `per_query`, as in the published code and results: take delta at every query position of every sequence, then average
  the penalties.
- `per_head`, as in Algorithm 1: average the entropy over positions and sequences, then take delta once per head.

The published code sums over the sequences and positions of a micro-batch, so its lambda depends on their number.
`coefficient` multiplies a mean instead: coefficient = lambda * micro_batch_size * T. For the paper's CodeParrot runs
that is 1e-5 * 128 * 128 = 0.164.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import explained


@dataclass(frozen=True)
class RegularizerConfig:
    """Strength and shape of the entropy penalty. It acts if `model.regularized` is true."""

    coefficient: float = explained(
        0.164, "Weight of the penalty in the loss per token, in 1/nat^2: the paper's lambda * micro-batch * T."
    )
    margin: float = explained(
        0.20,
        "Tolerance gamma as a fraction of ln T. There is no penalty while the entropy stays this close to theta ln T. "
        "The paper uses 0 to 0.30.",
    )
    granularity: Literal["per_query", "per_head"] = explained(
        "per_query",
        "'per_query' penalizes the entropy of each query (published code). 'per_head' penalizes the mean entropy of a "
        "head over one micro-batch of all data-parallel ranks (published algorithm).",
    )

    def faults(self) -> list[str]:
        faults = []
        if self.coefficient < 0:
            faults.append(f"regularizer.coefficient = {self.coefficient} must not be negative; 0 turns the penalty off")
        if not 0 <= self.margin < 1:
            faults.append(f"regularizer.margin = {self.margin} must lie in [0, 1): it is a fraction of ln T")
        return faults


def penalty(entropy: Tensor, threshold: Tensor, max_entropy_nats: float, margin: float) -> Tensor:
    """Return delta^2 where |delta| > margin * max_entropy, else 0. The whole delta is squared, on both sides.

    Args:
        entropy: nats, any shape that `threshold` broadcasts to.
        threshold: theta as a fraction of max_entropy_nats.
    """
    delta = entropy - threshold * max_entropy_nats
    return torch.where(delta.abs() > margin * max_entropy_nats, delta.square(), 0.0)


def entropy_penalty(
    entropies_BNT: list[Tensor], thresholds_N: list[Tensor], config: RegularizerConfig, seq_length: int
) -> Tensor:
    """Return the regularizer of a whole model on one process: a scalar, before the coefficient.

    Args:
        entropies_BNT: one tensor of entropies in nats for each layer.
        thresholds_N: theta of each layer's heads.
        seq_length: T of ln T.
    """
    max_entropy = math.log(seq_length)
    entropy_LBNT = torch.stack(entropies_BNT)
    threshold_LN = torch.stack([threshold.to(entropy_LBNT.dtype) for threshold in thresholds_N])
    if config.granularity == "per_head":
        return penalty(entropy_LBNT.mean(dim=(1, 3)), threshold_LN, max_entropy, config.margin).mean()
    return penalty(entropy_LBNT, threshold_LN[:, None, :, None], max_entropy, config.margin).mean()
