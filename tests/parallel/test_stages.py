"""Test how layers are divided over pipeline stages, against all ways to divide them."""

import itertools

import pytest

from model.config import ModelConfig
from parallel.layout import parse_layout
from parallel.stages import block_flops, head_flops, stage_layers
from tests.parallel.tiny import EREG, VOCAB_SIZE, assert_layout, tiny_config
from train.config import load_config
from train.cost.flops import training_flops_per_token

BILLION = load_config("configs/ereg_1b.json").model


def sizes(model: ModelConfig, vocab_size: int, pp: int, recompute: str = "none") -> list[int]:
    """Return the number of layers of each stage, and check that the stages hold each layer once, in order."""
    held = stage_layers(model, vocab_size, pp, recompute)
    assert [layer for layers in held for layer in layers] == list(range(model.num_layers))
    return [len(layers) for layers in held]


def slowest(division: tuple[int, ...] | list[int], head: float) -> float:
    return max(*division[:-1], division[-1] + head)


@pytest.mark.parametrize("num_layers", [4, 7, 12])
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [1, 300, 1000, 3000])
def test_no_division_has_a_faster_slowest_stage(num_layers: int, pp: int, vocab_size: int) -> None:
    model = tiny_config(num_layers=num_layers).model
    head = head_flops(model, vocab_size) / block_flops(model, "none")
    possible = [each for each in itertools.product(range(1, num_layers), repeat=pp) if sum(each) == num_layers]
    found = sizes(model, vocab_size, pp)
    assert min(found) >= 1
    assert slowest(found, head) == min(slowest(each, head) for each in possible)
    assert max(found[:-1]) - min(found[:-1]) <= 1 and found[:-1] == sorted(found[:-1]), "later stages take one more"


@pytest.mark.parametrize(
    ("vocab_size", "pp", "recompute", "expected"),
    [
        (32_000, 1, "none", [28]),
        (32_000, 2, "none", [15, 13]),
        (32_000, 4, "none", [7, 8, 8, 5]),
        (50_000, 2, "none", [16, 12]),
        (50_000, 2, "full", [15, 13]),  # a block costs a forward pass more, the head does not
        (50_000, 28, "none", [1] * 28),
    ],
)
def test_the_billion_parameter_model(vocab_size: int, pp: int, recompute: str, expected: list[int]) -> None:
    assert sizes(BILLION, vocab_size, pp, recompute) == expected


def test_flops_are_those_of_mfu_but_for_scores_that_are_computed_again() -> None:
    again = BILLION.num_layers * BILLION.seq_length * BILLION.hidden_size
    counted = BILLION.num_layers * block_flops(BILLION, "none") + head_flops(BILLION, 50_000)
    assert counted == training_flops_per_token(BILLION, 50_000) + again


def test_more_stages_than_layers_are_no_division() -> None:
    with pytest.raises(AssertionError, match=r"\(4, 3\)"):
        stage_layers(tiny_config(num_layers=3).model, VOCAB_SIZE, 4)


def test_four_uneven_stages_compute_what_one_process_does() -> None:
    config = {"architecture": EREG, "num_layers": 6, "vocab_size": 900}
    assert sizes(tiny_config(**config).model, 900, 4) == [1, 2, 2, 1]
    assert_layout(parse_layout("pp=4:acc=4"), "float32", **config)
