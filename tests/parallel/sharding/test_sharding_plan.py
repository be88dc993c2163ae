"""The table of shardings: every parameter of every architecture has a row, and a model must be as its rows say."""

import itertools
import re
from typing import Any
from unittest import mock

import pytest

from model.config import ModelConfig
from model.transformer import global_shapes
from parallel.layout import parse_layout
from parallel.local_ranks import RankError, run_ranks
from parallel.sharding import plan as module
from parallel.sharding.plan import TABLE, ShardingPlan
from tests.model.reference import PLACEMENTS, RECIPES
from tests.parallel.tiny import EREG, SIZES, VOCAB_SIZE, tiny_config
from train.compare.command import apply_layout, reference_layout

CHOICES: list[dict[str, Any]] = [
    *({"architecture": architecture} for architecture in RECIPES),
    *(
        {"architecture": architecture, "weight_norm": place}
        for architecture, place in itertools.product(("SM", "SM+ScFuFFN"), PLACEMENTS)
    ),
    *(
        {"architecture": architecture, "spectral_norm": "QKVO+FFN", "spectral_gain": True}
        for architecture in ("SM", "SM+ScFuFFN")
    ),
    {"architecture": EREG, "tied_head": False},
    {"architecture": "SM+LN+G", "biases": "all"},
]


def names() -> set[str]:
    """Return every parameter's global name without its layer."""
    models = (ModelConfig(**{**SIZES, **choice}).resolved() for choice in CHOICES)
    return {re.sub(r"^layers\.\d+\.", "", name) for model in models for name in global_shapes(model, VOCAB_SIZE)}


def plan(**changes: Any) -> ShardingPlan:
    model = ModelConfig(**SIZES, architecture=EREG).resolved()
    arguments = {"model": model, "tp": 2, "sequence_parallel": False, "replicates_fused_ffn": False}
    return ShardingPlan(**{**arguments, **changes})


def test_the_table_has_a_row_for_every_parameter_and_no_other() -> None:
    assert names() == set(TABLE)


def test_a_parameter_without_a_row_is_an_error_that_names_the_table() -> None:
    for ask in (plan().split_dim, plan().has_partial_gradient, plan(tp=1).split_dim):
        with pytest.raises(
            LookupError, match=r"layers\.3\.ffn\.gamma has no row in TABLE of parallel/sharding/plan\.py"
        ):
            ask("layers.3.ffn.gamma")


def test_one_rank_splits_nothing() -> None:
    alone = plan(tp=1, sequence_parallel=False, replicates_fused_ffn=True)
    assert not any(alone.split_dim(name) is not None or alone.has_partial_gradient(name) for name in TABLE)


def test_what_is_held_whole_and_seen_in_part() -> None:
    cases = {
        "attention.output.gain": (True, True),
        "ffn.fused.gain": (True, True),
        "attention.query_key_value.gamma": (True, True),
        "ffn.alpha": (True, True),
        "ffn.beta": (True, True),  # on the diagonal of a matrix split by columns
        "head.norm.weight": (False, True),
        "attention_norm.bias": (False, True),
        "embedding.position.weight": (False, False),
        "attention.threshold": (False, False),  # split
        "ffn.fused.weight": (False, False),  # split
    }
    for name, expected in cases.items():
        found = tuple(plan(sequence_parallel=sp).has_partial_gradient(name) for sp in (False, True))
        assert found == expected, name
    normed = ModelConfig(**SIZES, architecture="SM+ScFuFFN", norm="layernorm").resolved()
    assert not plan(model=normed).has_partial_gradient("layers.0.ffn.beta")


def test_a_replicated_fused_ffn_is_whole_and_sees_its_positions_alone() -> None:
    replicated = plan(sequence_parallel=True, replicates_fused_ffn=True)
    assert replicated.split_dim("layers.0.ffn.fused.weight") is None
    assert replicated.has_partial_gradient("layers.0.ffn.fused.weight")
    assert plan(sequence_parallel=True).split_dim("layers.0.ffn.fused.weight") == 1


def _built_with(row: Any, config: Any) -> None:
    from parallel.sharding import tensor
    from train.parts import build_stage

    real = tensor.mark_split

    def mark_split(*args: Any) -> None:
        with mock.patch.dict(module.TABLE, row):
            real(*args)

    with mock.patch("parallel.sharding.stage.mark_split", mark_split):
        build_stage(config, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["attention.output.weight", "attention.threshold", "ffn.alpha", "head.norm.weight"])
def test_a_layer_that_is_not_as_its_row_says_is_an_error_that_names_it(name: str) -> None:
    layout, config = parse_layout("tp=2"), tiny_config(architecture=EREG)
    applied = apply_layout(config, layout, reference_layout(config, [layout]))
    wrong = module._Row(split=None if name == "attention.threshold" else 0)
    with pytest.raises(RankError, match=rf"{name} has shape .*, and parallel/sharding/plan\.py says"):
        run_ranks(_built_with, 2, {name: wrong}, applied)
