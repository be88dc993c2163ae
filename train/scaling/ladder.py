"""Plan a ladder of sizes for a compute budget: which models, how many tokens each, which learning rate and batch.

Sizes have 2 to 32 layers, a width of 64 times the depth and heads of width 64, as GPT-2 small has. In a step, a block
without norm changes the residual by about (rate * width / alpha), and blocks compound over the depth. So the largest
stable rate falls with the width and with the square root of the depth. Every architecture of a comparison follows the
same rule.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from train.cost.flops import training_flops_per_token
from train.cost.parameters import body_parameters, total_parameters

HEAD_WIDTH = 64
DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
WIDTH_PER_LAYER = 64
REFERENCE_WIDTH, REFERENCE_DEPTH, REFERENCE_RATE = 768, 12, 5e-4
LARGEST_RATE = 2e-3
DECAY_FRACTION = 0.2


class LadderError(ValueError):
    """No ladder fits; the message is one line."""


@dataclass(frozen=True)
class Rung:
    """One size of an architecture, with its budgets.

    Attributes:
        body_parameters: without embeddings and head.
        budgets_tokens: tokens of each result, rounded to whole steps.
        global_batch_size: in sequences.
        flops: training FLOPs of the trunk and all branches together.
    """

    model: ModelConfig
    parameters: int
    body_parameters: int
    budgets_tokens: tuple[int, ...]
    global_batch_size: int
    learning_rate: float
    flops: float

    @property
    def name(self) -> str:
        return f"{short_name(self.model.architecture)}-{self.model.num_layers}x{self.model.hidden_size}"


def short_name(architecture: str) -> str:
    """Remove brackets, which shells need quoted: SMt+ScFuFFN. Of EReg, what differs from the paper stays: EReg+R."""
    return re.sub(r"\(SM\(t\)(\+ScFuFFN)?|[()]", "", architecture)


def learning_rate(layers: int, width: int) -> float:
    """Return the learning rate in two digits: 5e-4 at 12 x 768, falling with the width and the root of the depth."""
    rate = REFERENCE_RATE * REFERENCE_WIDTH / width * math.sqrt(REFERENCE_DEPTH / layers)
    return float(f"{min(rate, LARGEST_RATE):.2g}")


def batch_size(tokens: float, seq_length: int) -> int:
    """Return the sequences of a step: about 2,000 steps to the end, within 4,096 to 524,288 tokens a step.

    It is a power of two, so that micro-batches of a power of two divide it.
    """
    step_tokens = 2 ** min(19, max(12, round(math.log2(tokens / 2000))))
    return int(2 ** max(0, round(math.log2(step_tokens / seq_length))))


def rung(model: ModelConfig, vocab_size: int, tokens: Sequence[float]) -> Rung:
    """Plan one model that is to be evaluated at the given token counts."""
    sequences = batch_size(max(tokens), model.seq_length)
    step_tokens = sequences * model.seq_length
    budgets = tuple(sorted({max(10, round(count / step_tokens)) * step_tokens for count in tokens}))
    trained = max(budgets) + DECAY_FRACTION * sum(budgets[:-1])  # the longest branch goes on from the trunk's end
    return Rung(
        model=model,
        parameters=total_parameters(model, vocab_size),
        body_parameters=body_parameters(model, vocab_size),
        budgets_tokens=budgets,
        global_batch_size=sequences,
        learning_rate=learning_rate(model.num_layers, model.hidden_size),
        flops=trained * training_flops_per_token(model, vocab_size),
    )


def plan(
    architectures: Sequence[str],
    budget_flops: float,
    sizes: int,
    ratios: Sequence[float],
    vocab_size: int,
    seq_length: int,
    counted: str = "total",
    levels: int = 0,
) -> list[Rung]:
    """Find the ladder with the largest sizes that the budget pays for; its sizes are the same for every architecture.

    Args:
        architectures: by the paper's names.
        budget_flops: training FLOPs of all runs together.
        sizes: number of consecutive sizes.
        ratios: token budgets, in tokens a parameter.
        vocab_size: of the dataset.
        seq_length: context in tokens.
        counted: which parameters the ratios count, 'total' or 'body'.
        levels: if not 0, evaluate at this many common levels of compute instead, so that sizes compare at equal
            compute. Each size takes the levels between its smallest and its largest ratio.

    Raises:
        LadderError: not even the smallest sizes fit; says what they would take.
    """
    best: list[Rung] = []
    cheapest = math.inf
    for start in range(len(DEPTHS) - sizes + 1):
        models = [_model(name, depth, seq_length) for name in architectures for depth in DEPTHS[start : start + sizes]]
        rungs = [
            rung(model, vocab_size, tokens)
            for model, tokens in zip(models, _tokens(models, vocab_size, ratios, counted, levels), strict=True)
        ]
        flops = sum(one.flops for one in rungs)
        cheapest = min(cheapest, flops)
        if flops <= budget_flops:
            best = rungs
    if not best:
        raise LadderError(
            f"{budget_flops:.3g} FLOPs do not pay for {sizes} sizes; the smallest {sizes} take {cheapest:.3g}: "
            "raise --flops, or ask for fewer --sizes, fewer --ratios or smaller ones"
        )
    return best


def _tokens(
    models: Sequence[ModelConfig], vocab_size: int, ratios: Sequence[float], counted: str, levels: int
) -> list[list[float]]:
    """Return the token budgets of each model."""
    count = body_parameters if counted == "body" else total_parameters
    bases = [count(model, vocab_size) for model in models]
    if not levels:
        return [[ratio * base for ratio in ratios] for base in bases]
    costs = [training_flops_per_token(model, vocab_size) for model in models]
    middle = math.sqrt(min(ratios) * max(ratios))
    at_middle = [middle * base * cost for base, cost in zip(bases, costs, strict=True)]
    step = (max(at_middle) / min(at_middle)) ** (1 / max(1, levels - 1))
    found = []
    for base, cost in zip(bases, costs, strict=True):
        counts = [min(at_middle) * step**level / cost for level in range(levels)]
        inside = [count for count in counts if min(ratios) * base <= count <= max(ratios) * base]
        found.append(inside or [middle * base])
    return found


def _model(architecture: str, depth: int, seq_length: int) -> ModelConfig:
    width = WIDTH_PER_LAYER * depth
    return ModelConfig(
        architecture=architecture,
        num_layers=depth,
        hidden_size=width,
        num_attention_heads=width // HEAD_WIDTH,
        seq_length=seq_length,
    ).resolved()


def suite_tree(
    name: str, rungs: Sequence[Rung], data: str, micro_batch_tokens: int, rate_factors: Sequence[float] = (1.0,)
) -> dict[str, Any]:
    """Make the suite file of a ladder.

    Args:
        name: of the suite.
        rungs: of the ladder.
        data: path of the dataset.
        micro_batch_tokens: largest micro-batch in tokens.
        rate_factors: of the learning rate, to sweep at the smallest size of each architecture.
    """
    smallest = {one.model.architecture: min(r.parameters for r in rungs if _same_architecture(r, one))
                for one in rungs}  # fmt: skip
    runs = []
    for one in rungs:
        swept = one.parameters == smallest[one.model.architecture]
        for factor in rate_factors if swept else (1.0,):
            suffix = "" if factor == 1 else f"-rate{factor:g}"
            scaled = dataclasses.replace(one, learning_rate=one.learning_rate * factor)
            runs.append({"name": one.name + suffix, "config": _run_tree(scaled, micro_batch_tokens),
                         "budgets_tokens": list(one.budgets_tokens)})  # fmt: skip
    base = {
        "data": {"path": data},
        "checkpoint": {"interval": 0},
        "logging": {"interval": 20, "tensorboard": False},
    }
    return {"name": name, "output": f"runs/{name}", "seeds": [1], "base": base, "runs": runs}


def _same_architecture(one: Rung, other: Rung) -> bool:
    return one.model.architecture == other.model.architecture


def _run_tree(one: Rung, micro_batch_tokens: int) -> dict[str, Any]:
    model = one.model
    most = max(1, micro_batch_tokens // model.seq_length)
    micro = min(one.global_batch_size, 2 ** (most.bit_length() - 1))
    sizes = ("architecture", "num_layers", "hidden_size", "num_attention_heads", "seq_length")
    longest = max(one.budgets_tokens) // (one.global_batch_size * model.seq_length)
    return {
        "model": {key: getattr(model, key) for key in sizes},
        "optimizer": {
            "learning_rate": one.learning_rate,
            "schedule": "wsd",
            "decay_fraction": DECAY_FRACTION,
            "warmup_steps": min(100, max(1, longest // 10)),
            "beta2": 0.95,
        },
        "training": {
            "micro_batch_size": micro,
            "global_batch_size": one.global_batch_size,
            "evaluation_interval": 0,
        },
    }
