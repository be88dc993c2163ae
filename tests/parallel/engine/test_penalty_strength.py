"""Test that a step's penalty strength multiplies the coefficient, in every micro-batch and on every stage."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from parallel.sharding.megatron import Groups
from tests.parallel.tiny import tiny_config
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import _micro_batches
from train.config import Config
from train.parts import build_engine, build_groups

STRENGTHS = (0.5, 2.0, 0.0)
"""Powers of two and zero, so that products with the coefficient are exact."""


def _first_losses(config: Config, strengths: Sequence[float], groups: Groups | None = None) -> list[list[float]]:
    """Return cross-entropy, entropy loss and gradient norm of a step at each strength, all from the initial weights."""
    groups = groups or build_groups(config)
    vocab_size, batches = global_batches(config, 1)
    engine = build_engine(config, vocab_size, groups)
    losses = []
    for strength in strengths:
        micro_batches = _micro_batches(config, groups.grid, batches[0])
        report = engine.train_step(micro_batches, 0.0, penalty_strength=strength)[0].wait()
        losses.append([report.cross_entropy, report.entropy_loss, report.gradient_norm])
    return losses


def _with_coefficient(config: Config, coefficient: float) -> Config:
    return dataclasses.replace(config, regularizer=dataclasses.replace(config.regularizer, coefficient=coefficient))


@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
def test_strength_is_a_factor_of_the_coefficient(granularity: str, one_process: Groups) -> None:
    config = tiny_config(granularity=granularity)
    found = _first_losses(config, STRENGTHS, one_process)
    for losses, strength in zip(found, STRENGTHS, strict=True):
        assert losses == _first_losses(_with_coefficient(config, strength), [1.0], one_process)[0]
    assert found[0][1] > 0 and found[1][1] == 4 * found[0][1] and found[2][1] == 0
    assert len({norm for *_, norm in found}) == len(STRENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
def test_pipeline_stages_have_the_same_strength(granularity: str) -> None:
    config, layout = tiny_config(granularity=granularity), parse_layout("pp=2:dp=2:acc=2")
    applied = apply_layout(config, layout, reference_layout(config, [layout]))
    found = run_ranks(_first_losses, layout.world_size, applied, STRENGTHS)[0]
    expected = [
        run_ranks(_first_losses, layout.world_size, _with_coefficient(applied, strength), [1.0])[0][0]
        for strength in STRENGTHS
    ]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
