"""The learning rate as a function of the step."""

import math

from train.config.config import Config
from train.config.sections import OptimizerConfig

# Where networks without norms reached NaN for want of a warm-up, and what was enough: docs/study/stability.md.
SAFE_RATE_BY_WIDTH, SHORT_WARMUP_STEPS, ENOUGH_WARMUP_STEPS = 0.4, 50, 100


def warmup_steps(config: OptimizerConfig, train_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_fraction * train_steps)


def learning_rate(config: OptimizerConfig, step: int, train_steps: int) -> float:
    """The rate of the optimizer step that leads from `step` to `step + 1` (step counts from 0).

    Warm-up rises linearly and reaches the peak with its last step; the decay ends at `min_learning_rate` after
    `train_steps`.
    'wsd' (warm-up, stable, decay) stays at the peak until the last `decay_fraction` of the run and falls linearly
    there.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    warmup = warmup_steps(config, train_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, round((1 - config.decay_fraction) * train_steps))
    if step < start:
        return peak
    progress = min(1.0, (step - start) / max(1, train_steps - start))
    if config.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress


def fast_start(config: Config) -> str | None:
    """What there is to say against a start as fast as those that networks without norms did not survive, or None."""
    model, steps = config.model, warmup_steps(config.optimizer, config.train_steps)
    rate_by_width = config.optimizer.learning_rate * model.hidden_size * math.sqrt(max(1.0, model.num_layers / 12))
    if model.norm != "none" or steps >= SHORT_WARMUP_STEPS or rate_by_width <= SAFE_RATE_BY_WIDTH:
        return None
    return (
        f"optimizer.learning_rate = {config.optimizer.learning_rate:g} is reached in {steps} steps; networks without "
        f"norms of this size went to NaN after so short a warm-up: set optimizer.warmup_steps = {ENOUGH_WARMUP_STEPS} "
        "or a lower rate"
    )
