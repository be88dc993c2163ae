"""The best value is chosen on one half and reported on the other; a lost run counts, and never drops out."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.train.study.saved_results import VOCABULARY, Given, valley, write_results, write_suite
from train.study.report.sweep_pictures import Line, Point, apart, sweep_figure
from train.study.report.write import write_report
from train.study.results import records
from train.study.saved import with_results
from train.study.statistics.hypotheses import curve_of
from train.study.statistics.sweeps import Curve, curves_of
from train.study.suite import PlannedRun, load_suite

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
RATE = "optimizer.learning_rate"


def curve(folder: Path, given: object, rates: list[float] = RATES, seeds: tuple[int, ...] = (1, 2)) -> Curve:
    """Return the one curve of a suite whose results are given by a formula of (rate, seed)."""

    def of_run(run: PlannedRun) -> Given | None:
        return given(run.swept[RATE], run.seed)  # type: ignore[operator]

    file = write_suite(folder, runs=[{"name": "a", "sweep": {RATE: rates}}], seeds=list(seeds))
    saved = write_results(folder / "results.json", file, of_run)
    return curves_of(records(with_results(load_suite(file), [saved])))[0]


def halves(first: float, second: float) -> Given:
    return {"loss": (first + second) / 2, "halves": [first, second]}


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    """The first half favours 2e-3 and the second 1e-3."""
    firsts = dict(zip(RATES, (4.4, 4.2, 4.1, 4.3, 4.5), strict=True))
    seconds = dict(zip(RATES, (4.3, 4.0, 4.2, 4.3, 4.5), strict=True))
    best = curve(tmp_path, lambda rate, seed: halves(firsts[rate], seconds[rate] + 0.01 * seed)).best
    assert best is not None and (best.value, best.seeds, best.at_edge) == (2e-3, 2, False)
    assert best.loss == pytest.approx(4.2 + 0.015)
    assert best.half_width == pytest.approx(12.706 * 0.01 / 2, rel=1e-3)  # Student's t of 1 degree of freedom


def test_choosing_on_the_reported_half_would_flatter(tmp_path: Path) -> None:
    """Simulation: of five equal rates the chosen one is no better on the other half, but seems so on its own."""
    draws, seen, other = np.random.default_rng(4), [], []
    for _ in range(60):
        noise = {rate: draws.normal(4, 0.1, 2) for rate in RATES}
        best = curve(tmp_path, lambda rate, seed: halves(*noise[rate]), seeds=(1,)).best  # noqa: B023
        assert best is not None
        seen.append(min(values[0] for values in noise.values()))
        other.append(best.loss)
    assert np.mean(seen) == pytest.approx(4 - 0.116, abs=0.03)  # the least of five normal deviates is -1.163
    assert np.mean(other) == pytest.approx(4, abs=0.04)


@pytest.mark.parametrize(("at", "at_edge"), [(2e-4, True), (2e-3, False), (2e-2, True)])
def test_a_best_value_at_the_edge_is_marked(tmp_path: Path, at: float, at_edge: bool) -> None:
    best = curve(tmp_path, lambda rate, seed: halves(valley(rate, at, 4.0), valley(rate, at, 4.0))).best
    assert best is not None and best.at_edge == at_edge and (best.fitted is None) == at_edge


def test_the_parabola_finds_the_valley_between_the_rates(tmp_path: Path) -> None:
    """A loss that is a parabola is found exactly; the loss there is the second half's."""
    at = 1.3e-3
    best = curve(tmp_path, lambda rate, seed: halves(valley(rate, at, 4.0), valley(rate, at, 4.5))).best
    assert best is not None and best.fitted == (pytest.approx(at), pytest.approx(4.5))


def test_a_diverged_run_counts_as_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """One of two seeds diverges at the rate that would otherwise be best."""

    def given(rate: float, seed: int) -> Given:
        if rate >= 4e-3 and seed == 2:
            return {"detail": "step 5: the loss is nan", "lost_layer": 1}
        return halves(*[4.0 - 100 * rate] * 2) if rate < 8e-3 else halves(7.0, 7.0)

    found = curve(tmp_path, given)
    assert found.best is not None and found.best.value == 2e-3 and found.best.fitted is None
    assert (found.lost, len(found.trials), found.unfinished) == (3, 10, 0), "7 nats are above ln 400 = 5.99"
    assert [trial.first for trial in found.at(8e-3)] == [math.log(VOCABULARY)] * 2
    assert found.largest_stable() == 2e-3
    assert found.largest_stable(within_nats=0.05) is None, "5e-4 ends 0.15 above 2e-3"


def test_what_is_unfinished_is_counted_and_nothing_is_chosen_without_it(tmp_path: Path) -> None:
    found = curve(tmp_path, lambda rate, seed: None if (rate, seed) == (2e-3, 1) else halves(4.0, 4.0))
    assert found.unfinished == 1 and found.best is not None and found.largest_stable() == 1e-3
    found = curve(tmp_path, lambda rate, seed: None if rate == 2e-3 else halves(4.0, 4.0))
    assert found.unfinished == 2 and found.best is None


def test_results_without_halves_say_so(tmp_path: Path) -> None:
    found = curve(tmp_path, lambda rate, seed: {"loss": valley(rate, 2e-3, 4.0)})
    assert not found.has_halves and found.best is not None and found.best.loss == pytest.approx(4.0)


def test_words_are_swept_without_an_order(tmp_path: Path) -> None:
    shapes = ["square", "floor", "hinge"]
    arm = {"name": "a", "sweep": {"regularizer.shape": shapes}}
    claim = {"name": "H", "kind": "better", "arms": ["a", "b"], "at": "own best"}
    arms = [arm, {**arm, "name": "b"}]
    file = write_suite(tmp_path, runs=arms, seeds=[1, 2], hypotheses=[claim])
    losses = dict(zip(shapes, (4.1, 4.2, 4.0), strict=True))
    given = write_results(
        tmp_path / "results.json", file, lambda run: halves(*[losses[run.swept["regularizer.shape"]]] * 2)
    )
    suite = with_results(load_suite(file), [given])
    found = curves_of(records(suite))[0]
    assert found.values == shapes and found.largest_stable() is None
    assert found.best is not None and (found.best.value, found.best.at_edge) == ("hinge", False)
    report = write_report(suite, tmp_path / "report")[0].read_text()
    assert "| square | floor | hinge |" in report and "| hinge | 4.0000" in report


def test_other_swept_keys_make_curves_of_their_own() -> None:
    assert curve_of("a", {}) == ("a", None, None)
    assert curve_of("a", {"optimizer.warmup_steps": 50}) == ("a", "optimizer.warmup_steps", 50)
    assert curve_of("a", {"model.num_layers": 6, RATE: 1e-3}) == ("a-num_layers6", RATE, 1e-3)


def test_labels_are_moved_apart_no_more_than_needed() -> None:
    assert apart([0.0, 0.5, 1.0], 0.1) == [0.0, 0.5, 1.0]
    assert apart([0.5, 0.5, 0.52], 0.1) == pytest.approx([0.40667, 0.50667, 0.60667], abs=1e-4)
    moved = apart(sorted(np.random.default_rng(5).uniform(size=9)), 0.06)
    assert (np.diff(moved) >= 0.06 - 1e-9).all()


def test_the_picture_names_each_arm_and_each_loss_of_runs() -> None:
    layers = np.array([2.0, 1.0])
    lines = [
        Line("a", [Point(1e-3, (4.0, 4.1)), Point(2e-3, (3.9, 4.0)), Point(4e-3, (4.0,), lost=1)]),
        Line("b", [Point(1e-3, (4.2,), 0, layers, 60), Point(2e-3, (9.0,), 0, layers, 60)], 2.5),
    ]
    figure = sweep_figure(lines, RATE)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["1 of 2 lost", "a", "9.00", "b", "a", "b"] and len(figure.axes) == 2
    bottom, top = figure.axes[0].get_ylim()
    assert 3.8 < bottom < 3.95 and 4.2 < top < 5.5, "the scale is that of the valleys"
    assert figure.axes[0].get_xscale() == "log" and figure.axes[1].get_title() == "b\nstep 60"
