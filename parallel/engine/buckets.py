"""The parameter groups of the optimizer, which are the buckets that gradients and weights are exchanged in.

ZeRO makes one flat buffer of each parameter group and cuts it over replicas, so a bucket must be a group of its own.
The matrices of consecutive layers form one. Those of the embedding and of an untied head stand alone. Everything else,
which does not decay, is one small group. Thresholds or temperatures leave it for a group of their own if they learn at
another rate.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from model.initialize import named_parameters
from model.transformer import Transformer
from parallel import config

ALIGNMENT_BYTES = 16
ALIGNMENT_ELEMENTS = 8  # of bfloat16
NO_FACTORS: Mapping[str, float] = MappingProxyType({})


def parameter_groups(
    transformer: Transformer, weight_decay: float, replicas: int, rate_factors: Mapping[str, float] = NO_FACTORS
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups in the order in which a forward pass uses them; the small ones come first.

    Each has a key `rate_factor` beside AdamW's own, by which the learning rate is multiplied.

    Layers are joined from the last one on, in the order of their gradients, until a bucket is large enough. The first
    layers may form a smaller one: it is exchanged last, when nothing is left to hide it.

    One flat buffer of everything would not do even without replicas: a single scalar would shift every matrix behind it
    off the 16-byte grid, which Hopper's fast matrix products need.

    Args:
        weight_decay: of matrices.
        replicas: ranks that exchange the buckets; with one, all matrices are in one bucket.
        rate_factors: of parameters that do not decay, by the last part of their names: {"threshold": 0.1}.
    """
    small: dict[float, list[nn.Parameter]] = {1.0: []}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters(transformer):
        if name.endswith("weight") and parameter.dim() == 2:
            part = name.split(".")[1] if name.startswith("layers.") else name.split(".")[0]
            parts.setdefault(part, []).append(parameter)
        else:
            small.setdefault(rate_factors.get(name.rpartition(".")[2], 1.0), []).append(parameter)
    least = config.least_bucket_elements(replicas)
    buckets: list[list[nn.Parameter]] = []
    may_join = False
    for part, matrices in reversed(parts.items()):
        is_layer = part.isdecimal()
        if buckets and (replicas == 1 or (is_layer and may_join)):
            buckets[0] = [*matrices, *buckets[0]]
        else:
            buckets.insert(0, matrices)
        may_join = is_layer and sum(matrix.numel() for matrix in buckets[0]) < least
    groups = [(each, 0.0, factor) for factor, each in small.items()] + [(each, weight_decay, 1.0) for each in buckets]
    return [
        {"params": sorted(parameters, key=_place), "weight_decay": decay, "rate_factor": rate_factor}
        for parameters, decay, rate_factor in groups
        if parameters
    ]


def _place(parameter: nn.Parameter) -> tuple[bool, bool]:
    """Return a key that puts odd sizes last, since kernels read 16 bytes at a time, and partial gradients together."""
    is_odd, is_partial = parameter.numel() % ALIGNMENT_ELEMENTS != 0, parameter.has_partial_gradient
    return is_odd, is_partial != is_odd
