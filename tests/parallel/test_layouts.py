"""Every layout trains the same network as one process: losses, gradient norms, entropies, weights and Adam's moments.

Adam's first moment after one step is (1 - beta1) times the clipped gradient, so it compares every parameter's gradient.
"""

import functools

import pytest
import torch

from tests.parallel.layouts import Layout, Outcome, model_config, outcome

LAYOUTS = [
    Layout(tp=2),
    Layout(tp=4),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(pp=3),  # four layers: 2, 1, 1
    Layout(dp=2),
    Layout(dp=2, zero_stage=2),
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, pp=2),
    Layout(tp=2, dp=2, zero_stage=3),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True),
    Layout(recompute=True),
    Layout(tp=2, pp=2, recompute=True),
]
EREG = "EReg(SM(t)+ScFuFFN)"


@functools.cache
def one_process(architecture: str, steps: int, granularity: str) -> Outcome:
    return outcome(Layout(), model_config(architecture=architecture), steps, granularity)


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 1e-30) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(floor))


def worst_tensor(found: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest relative error of any tensor and whose it is.

    Relative to at least 1e-3 of the norm over all parameters: the gradient of a key bias is zero in exact arithmetic,
    since softmax ignores what is added to all keys alike, and comparing rounding noise with itself says nothing.
    """
    assert found.tensors.keys() == expected.tensors.keys()
    whole = {
        kind: torch.stack([t.norm() for name, t in expected.tensors.items() if name.startswith(kind + " ")]).norm()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    return max(
        (relative_error(found.tensors[name], tensor, 1e-3 * float(whole[name.split()[0]])), name)
        for name, tensor in expected.tensors.items()
    )


@pytest.mark.parametrize("granularity", ["per_query", "per_head"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_one_process(layout: Layout, granularity: str) -> None:
    expected = one_process(EREG, 1, granularity)
    found = outcome(layout, model_config(architecture=EREG), 1, granularity)
    assert expected.steps[0, 1] > 1e-3, "the regularizer must act, or the test shows nothing"
    assert relative_error(found.steps, expected.steps) < 1e-6
    assert relative_error(found.entropy_LN, expected.entropy_LN) < 1e-6
    assert worst_tensor(found, expected) < (1e-5,)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_losses_agree_over_twenty_steps(layout: Layout) -> None:
    expected = one_process(EREG, 20, "per_query")
    found = outcome(layout, model_config(architecture=EREG), 20)
    torch.testing.assert_close(found.steps[:, :2], expected.steps[:, :2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+ScFFN"])
@pytest.mark.parametrize("layout", [Layout(tp=2, sequence_parallel=True), Layout(tp=2, pp=2)], ids=str)
def test_other_architectures_equal_one_process(layout: Layout, architecture: str) -> None:
    compare(layout, architecture=architecture)


@pytest.mark.parametrize("normalization", ["weight_norm", "spectral_norm"])
def test_normalized_weights_equal_one_process(normalization: str) -> None:
    compare(Layout(tp=2, sequence_parallel=True), architecture="SM", **{normalization: "QKVO+FFN"})


def test_untied_head_rotary_positions_and_no_final_norm() -> None:
    compare(Layout(tp=2, pp=2), architecture=EREG, tied_head=False, positions="rotary", final_norm=False)


def compare(layout: Layout, **model: object) -> None:
    expected = outcome(Layout(), model_config(**model), 2)
    found = outcome(layout, model_config(**model), 2)
    assert relative_error(found.steps, expected.steps) < 1e-6
    assert worst_tensor(found, expected) < (1e-5,)
