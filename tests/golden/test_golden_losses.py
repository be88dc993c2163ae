"""Compare the first losses of every shipped configuration with the golden ones, and check that mistakes show."""

import os
import shutil

import pytest
import torch

from parallel.local_ranks import run_ranks
from tests.golden.losses import FOLDER, TOLERANCE, Losses, distance, first_losses, read_sections, torch_release
from tests.golden.mistakes import losses_with
from tests.golden.small import SHIPPED, STEPS, small_config
from tests.versions import torch_versions

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="golden losses are those of a CPU; hide the GPUs with CUDA_VISIBLE_DEVICES=''"
)
compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile on a CPU needs g++ or $CXX"
)
OVERRIDDEN = [  # each with the relative change that it caused
    ("optimizer.epsilon=1e-7", "ereg"),  # 6.8e-05
    ("optimizer.gradient_clipping=1.01", "baseline"),  # 5.6e-04
    ("optimizer.gradient_clipping=1.01", "ereg"),  # 1.5e-05
    ("optimizer.beta2=0.998", "quickstart"),  # 3.3e-05
    ("model.init_std=0.0202", "ereg"),  # 4.9e-04
]
MISTAKES = [
    ("weight_decay_of_everything", "ereg"),  # 3.1e-03
    ("weight_decay_of_everything", "baseline"),  # 1.7e-03
    ("penalty_summed_over_layers", "ereg"),  # 2.0
    ("residual_of_one_layer_not_scaled", "ereg"),  # 2.2e-04
    ("rate_of_the_next_step", "quickstart"),  # 3.2e-03
    ("smaller_epsilon_of_layer_norms", "baseline"),  # 3.5e-03
]


def golden(name: str) -> Losses:
    sections = read_sections(name)
    if torch_release() not in sections and torch_release() not in torch_versions():
        pytest.skip(f"torch {torch_release()} is not a tested version, and has no golden losses")
    assert torch_release() in sections, f"no golden losses of {name}; `python -m tests.golden.write` writes them"
    return sections[torch_release()]


@on_cpu
@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_losses_are_the_golden_ones(name: str) -> None:
    expected = golden(name)
    (found,) = run_ranks(first_losses, 1, name)
    moved = distance(found, expected)
    assert moved < TOLERANCE, (
        f"the first losses of configs/{name}.json moved by {moved:.1e}, more than {TOLERANCE:.0e}; if the arithmetic "
        "was meant to change, run `make golden` and commit the diff"
    )


@on_cpu
@compiler
def test_compiled_blocks_give_the_golden_losses() -> None:
    expected = golden("quickstart")
    (found,) = run_ranks(first_losses, 1, "quickstart", "training.compile=on")
    assert distance(found, expected) < TOLERANCE


@on_cpu
@pytest.mark.parametrize(("override", "name"), OVERRIDDEN)
def test_another_setting_is_noticed(override: str, name: str) -> None:
    expected = golden(name)
    (found,) = run_ranks(first_losses, 1, name, override)
    assert distance(found, expected) > TOLERANCE


@on_cpu
@pytest.mark.parametrize(("mistake", "name"), MISTAKES)
def test_a_mistake_is_noticed(mistake: str, name: str) -> None:
    expected = golden(name)
    (found,) = run_ranks(losses_with, 1, mistake, name)
    assert distance(found, expected) > TOLERANCE


@pytest.mark.parametrize("name", SHIPPED)
def test_every_tested_version_has_a_section_and_they_agree(name: str) -> None:
    """A section that was written while one version computed wrongly would differ from the others."""
    sections = read_sections(name)
    assert list(sections) == torch_versions(), f"{name}.json holds {list(sections)}; run `python -m tests.golden.write`"
    first = sections[torch_versions()[0]]
    for version, losses in sections.items():
        assert {len(numbers) for numbers in losses.values()} == {STEPS}
        assert distance(losses, first) < TOLERANCE, f"torch {version} differs from {torch_versions()[0]}"


def test_no_golden_losses_are_left_of_a_configuration_that_is_gone() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_the_small_model_learns(name: str) -> None:
    """If the model did not learn, the losses would depend on the initialization alone."""
    for losses in read_sections(name).values():
        assert losses["cross_entropy"][-1] < losses["cross_entropy"][0] - 0.1
        if small_config(name).model.regularized:
            assert 0 < losses["entropy_loss"][-1] < losses["entropy_loss"][0]
