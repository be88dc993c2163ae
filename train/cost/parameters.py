"""Counts the parameters of a model. Vocabulary rows that only pad it for tensor parallelism do not count."""

from collections import Counter
from functools import cache

from model.config import ModelConfig
from model.transformer import global_shapes

KINDS = {
    "word embedding": ("embedding.word.",),
    "position embedding": ("embedding.position.",),
    "attention": (
        ".attention.query_key_value.",
        ".attention.output",
        ".attention.query_bias",
        ".attention.key_bias",
    ),
    "temperatures": (".temperature_parameter",),
    "thresholds": (".threshold",),
    "FFN": (".ffn.fused.", ".ffn.up.", ".ffn.down.", ".ffn.up_bias", ".ffn.bias"),
    "FFN scaling": (".ffn.alpha", ".ffn.beta"),
    "norms": ("norm.",),
    "head": ("head.weight",),
}
"""Kind -> what the names of its parameters contain; the first match counts."""
OUTSIDE_BODY = ("word embedding", "position embedding", "head")


@cache
def parameter_counts(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Count parameters by kind. A tied head counts with the word embedding.

    Args:
        model: resolved.
        vocab_size: V, unpadded.

    Returns:
        Kind -> count in the order of `KINDS`, then "other". Kinds that the model lacks are left out.
    """
    counts: Counter[str] = Counter()
    for name, shape in global_shapes(model, vocab_size).items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        counts[kind] += shape.numel()
    return {kind: counts[kind] for kind in (*KINDS, "other") if counts[kind]}


def total_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Count all parameters."""
    return sum(parameter_counts(model, vocab_size).values())


def body_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Count the parameters of the blocks and the final norm: all but embeddings and head."""
    return sum(count for kind, count in parameter_counts(model, vocab_size).items() if kind not in OUTSIDE_BODY)
