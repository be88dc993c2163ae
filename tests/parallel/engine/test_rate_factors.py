"""Test that thresholds and temperatures learn at their own rates, and nothing else does, in every layout."""

import dataclasses

import pytest
import torch
from torch import Tensor

from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from parallel.sharding.megatron import Groups
from tests.parallel.tiny import tiny_config, training_with
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import _micro_batches
from train.config import Config
from train.parts import build_engine, build_groups

RATE = 0.1


def _with_rates(config: Config, threshold_rate: float, temperature_rate: float) -> Config:
    optimizer = dataclasses.replace(
        config.optimizer, threshold_rate=threshold_rate, temperature_rate=temperature_rate, gradient_clipping=0.0
    )
    return dataclasses.replace(config, optimizer=optimizer)


def _trained(config: Config, steps: int, groups: Groups | None = None) -> dict[str, list[Tensor]]:
    """Train from the initial weights; return the chunks that this rank saves, by name: masters and moments."""
    groups = groups or build_groups(config)
    vocab_size, batches = global_batches(config, 1)
    engine = build_engine(config, vocab_size, groups)
    for _ in range(steps):
        engine.train_step(_micro_batches(config, groups.grid, batches[0]), RATE)
    saved: dict[str, list[Tensor]] = {}
    for chunk in engine.state_chunks(vocab_size):
        saved.setdefault(chunk.name, []).append(chunk.tensor.detach().clone())
    return saved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rate_factor_scales_the_step_of_its_kind_and_of_nothing_else(precision: str, one_process: Groups) -> None:
    config = training_with(tiny_config(), precision=precision)
    whole, other = (_trained(_with_rates(config, *rates), 1, one_process) for rates in ((1.0, 1.0), (0.5, 0.25)))
    assert whole.keys() == other.keys(), "a checkpoint has the same tensors at either rate"
    kinds = {"threshold": (config.model.threshold_init, 0.5), "temperature_parameter": (0.0, 0.25)}
    for name, tensors in whole.items():
        start, factor = kinds.get(name.rpartition(".")[2], (None, 1.0))
        for tensor, same in zip(tensors, other[name], strict=True):
            if name.startswith("model.") and start is not None:
                assert bool((tensor != start).any())
                torch.testing.assert_close(same - start, (tensor - start) * factor, rtol=1e-5, atol=0)
            else:
                assert torch.equal(tensor, same), name


LAYOUTS = [
    pytest.param("dp=2:zero=2", "bf16"),
    pytest.param("tp=2:pp=2", "bf16", marks=pytest.mark.slow),
    pytest.param("dp=2:zero=3", "fp32", marks=pytest.mark.slow),
    pytest.param("dp=2:cp=2", "fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "precision"), LAYOUTS)
def test_frozen_parameters_stay_where_they_start(layout: str, precision: str) -> None:
    config, parsed = training_with(tiny_config(), precision=precision), parse_layout(layout)
    applied = _with_rates(apply_layout(config, parsed, reference_layout(config, [parsed])), 0.0, 0.0)
    ranks = run_ranks(_trained, parsed.world_size, applied, 2)

    def held(name: str) -> Tensor:
        return torch.cat([tensor.flatten() for rank in ranks for key in rank if name in key for tensor in rank[key]])

    for kind, start in (("threshold", config.model.threshold_init), ("temperature_parameter", 0.0)):
        for layer in range(config.model.num_layers):
            name = f"layers.{layer}.attention.{kind}"
            assert bool((held(f"model.{name}") == start).all())
            assert bool((held(f"exp_avg.{name}") != 0).any()), "it had gradients"
    assert bool((held("model.layers.0.ffn.alpha") != 1).all())
