"""The learning rate as a function of the step."""

import math

from train.config_sections import OptimizerConfig


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
