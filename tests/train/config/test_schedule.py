"""The learning rate at every kind of step, worked out by hand."""

import math
from typing import Any

import pytest

from model.config import ModelConfig
from model.regularizer import RegularizerConfig
from train.config import Config
from train.config.schedule import fast_start, learning_rate, norm_gate, penalty_strength, start_warnings, warmup_steps
from train.config.sections import OptimizerConfig, TrainingConfig


def rates(config: OptimizerConfig, train_steps: int) -> list[float]:
    return [learning_rate(config, step, train_steps) for step in range(train_steps)]


def test_linear() -> None:
    """Two steps of warm-up to 8, then down by 1 a step towards 0 after step 10."""
    config = OptimizerConfig(learning_rate=8.0, schedule="linear", warmup_steps=2)
    assert rates(config, 10) == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1])


def test_linear_to_a_floor() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.5, schedule="linear", warmup_steps=0)
    assert rates(config, 5) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert learning_rate(config, 5, 5) == pytest.approx(0.5)


def test_cosine() -> None:
    """cos at 0, 60, 90, 120 and 180 degrees: 1, 1/2, 0, -1/2, -1."""
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.2, schedule="cosine", warmup_steps=4)
    assert rates(config, 10)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    for step, expected in ((4, 1.0), (6, 0.8), (7, 0.6), (8, 0.4), (10, 0.2)):
        assert learning_rate(config, step, 10) == pytest.approx(expected)


def test_wsd() -> None:
    """Warm-up, then constant, then linear over the last fifth."""
    config = OptimizerConfig(learning_rate=4.0, schedule="wsd", warmup_steps=2, decay_fraction=0.4)
    assert rates(config, 10) == pytest.approx([2, 4, 4, 4, 4, 4, 4, 3, 2, 1])


def test_wsd_whose_decay_would_start_inside_the_warm_up() -> None:
    config = OptimizerConfig(learning_rate=3.0, schedule="wsd", warmup_steps=3, decay_fraction=1.0)
    assert rates(config, 6) == pytest.approx([1, 2, 3, 3, 2, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_beyond_the_end_it_stays_at_the_floor(schedule: str) -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, schedule=schedule)
    assert learning_rate(config, 250, 100) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=20)
    assert rates(config, 5) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])


def test_warm_up_as_a_share_or_in_steps() -> None:
    assert warmup_steps(OptimizerConfig(warmup_fraction=0.05), 32_044) == 1602
    assert warmup_steps(OptimizerConfig(warmup_fraction=0.05, warmup_steps=7), 32_044) == 7
    assert warmup_steps(OptimizerConfig(warmup_fraction=0.05, warmup_steps=0), 32_044) == 0


def test_a_penalty_that_follows_the_rate_has_its_ratio_to_the_peak() -> None:
    optimizer = OptimizerConfig(learning_rate=8.0, schedule="linear", warmup_steps=2)
    constant = Config(optimizer=optimizer)
    following = Config(optimizer=optimizer, regularizer=RegularizerConfig(schedule="learning_rate"))
    taken = rates(optimizer, 10)
    assert [penalty_strength(following, rate) for rate in taken[:4]] == [0.5, 1.0, 1.0, 0.875]
    assert {penalty_strength(constant, rate) for rate in taken} == {1.0}


def test_the_gate_of_tapered_norms_falls_as_half_a_cosine() -> None:
    optimizer, training = OptimizerConfig(taper_start=0.2, taper_end=0.6), TrainingConfig(train_steps=10)
    config = Config(ModelConfig(architecture="SM+TN").resolved(), optimizer=optimizer, training=training)
    gates = [norm_gate(config, step) for step in range(12)]
    shares = [0.5 + 0.5 * math.cos(math.pi / 4 * quarter) for quarter in (1, 2, 3)]
    assert gates == [1.0, 1.0, 1.0, *map(pytest.approx, shares), *[0.0] * 6]
    other = Config(ModelConfig(architecture="SM+LN").resolved(), optimizer=optimizer, training=training)
    assert {norm_gate(other, step) for step in range(12)} == {1.0}


def test_a_run_of_one_step_is_trained_at_the_peak() -> None:
    for schedule in ("linear", "cosine", "wsd"):
        assert rates(OptimizerConfig(learning_rate=1.0, schedule=schedule), 1) == [1.0]


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"train_steps": 300}, True),  # 15 steps of warm-up to 1e-3 at 12 x 768: NaN
        ({"train_steps": 2000}, False),  # 100 steps: trained
        ({"train_steps": 300, "warmup_steps": 100}, False),
        ({"train_steps": 300, "learning_rate": 5e-4}, False),
        ({"train_steps": 300, "architecture": "SM+LN+G"}, False),
        ({"train_steps": 300, "learning_rate": 5e-4, "num_layers": 48}, True),
    ],
)
def test_a_start_too_fast_for_a_network_without_norms_is_told(changes: dict[str, Any], warns: bool) -> None:
    model = {key: value for key, value in changes.items() if key in ("architecture", "num_layers")}
    optimizer = {key: value for key, value in changes.items() if key in ("warmup_steps", "learning_rate")}
    config = Config(
        model=ModelConfig(**model).resolved(),
        optimizer=OptimizerConfig(**optimizer),
        training=TrainingConfig(train_steps=changes["train_steps"]),
    )
    text = fast_start(config)
    assert (text is not None) == warns
    if text is not None:
        assert "in 15 steps" in text and "optimizer.warmup_steps = 100" in text


@pytest.mark.parametrize(
    ("model", "warns"),
    [({"temperature_form": "raw"}, True), ({}, False), ({"temperature_form": "raw", "temperature": "none"}, False)],
)
def test_temperatures_that_can_cross_zero_are_told_at_the_start(model: dict[str, Any], warns: bool) -> None:
    config = Config(model=ModelConfig(**model).resolved(), training=TrainingConfig(train_steps=2000))
    told = dict(start_warnings(config))
    assert told.keys() == ({"raw temperatures"} if warns else set())
    assert not warns or "up to optimizer.learning_rate = 0.001 a step" in told["raw temperatures"]
