"""Computes the learning rate of each step, and what follows it."""

import math
from collections.abc import Iterator

from train.config.config import Config
from train.config.sections import OptimizerConfig

# Networks without norms reached NaN after too short a warm-up, and 100 steps were enough: docs/study/stability.md.
SAFE_RATE_BY_WIDTH, SHORT_WARMUP_STEPS, ENOUGH_WARMUP_STEPS = 0.4, 50, 100


def warmup_steps(config: OptimizerConfig, train_steps: int) -> int:
    """Return the number of warm-up steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_fraction * train_steps)


def learning_rate(config: OptimizerConfig, step: int, train_steps: int) -> float:
    """Return the learning rate of the optimizer step from `step` to `step + 1`.

    Warm-up rises linearly and reaches the peak at its last step. The decay reaches `min_learning_rate` after
    `train_steps`. 'wsd' (warm-up, stable, decay) stays at the peak, and decays linearly over the last
    `decay_fraction` of the run.

    Args:
        step: counted from 0.
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


def penalty_strength(config: Config, rate: float) -> float:
    """Return the factor of the regularizer's coefficient in a step of this learning rate."""
    return rate / config.optimizer.learning_rate if config.regularizer.schedule == "learning_rate" else 1.0


def norm_gate(config: Config, step: int) -> float:
    """Return the gate of tapered norms in the optimizer step that leads to `step`, and in evaluations after it.

    It is 1 up to `taper_start`, 0 from `taper_end` on, and half a cosine between them; 1 without tapered norms.
    """
    if config.model.norm != "taper":
        return 1.0
    start, end = config.optimizer.taper_start * config.train_steps, config.optimizer.taper_end * config.train_steps
    progress = min(1.0, max(0.0, (step - start) / (end - start)))
    return 0.5 * (1 + math.cos(math.pi * progress))


def start_warnings(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what a run's start should warn of: the event's name in the journal, and one line of text."""
    for event, text in (("fast start", fast_start(config)), ("raw temperatures", raw_temperatures(config))):
        if text is not None:
            yield event, text


def raw_temperatures(config: Config) -> str | None:
    """Return a warning if temperatures can cross zero; None otherwise."""
    model = config.model
    if model.temperature == "none" or model.temperature_form != "raw":
        return None
    return (
        "model.temperature_form = 'raw' (as published) lets temperatures cross zero, where logits grow without bound "
        f"and change sign: Adam moves t by up to optimizer.learning_rate = {config.optimizer.learning_rate:g} a step, "
        f"from model.temperature_init = {model.temperature_init}; 'exp' keeps them positive"
    )


def fast_start(config: Config) -> str | None:
    """Return a warning if a network without norms warms up too fast; None otherwise."""
    model, steps = config.model, warmup_steps(config.optimizer, config.train_steps)
    rate_by_width = config.optimizer.learning_rate * model.hidden_size * math.sqrt(max(1.0, model.num_layers / 12))
    if model.norm != "none" or steps >= SHORT_WARMUP_STEPS or rate_by_width <= SAFE_RATE_BY_WIDTH:
        return None
    return (
        f"optimizer.learning_rate = {config.optimizer.learning_rate:g} is reached in {steps} steps; networks without "
        f"norms of this size went to NaN after so short a warm-up: set optimizer.warmup_steps = {ENOUGH_WARMUP_STEPS} "
        "or a lower rate"
    )
