"""Hypotheses are read from the suite file, and judged by the runs of all seeds together."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.train.study.saved_results import Given, valley, write_results, write_suite
from train.study.results import records
from train.study.saved import with_results
from train.study.statistics.hypotheses import Hypothesis
from train.study.statistics.verdicts import Finding, Verdict, _verdict, judge
from train.study.suite import PlannedRun, SuiteError, load_suite

RATE = "optimizer.learning_rate"
RATES = [1e-3, 2e-3, 4e-3]
ARMS = [{"name": "a", "sweep": {RATE: RATES}}, {"name": "b", "sweep": {RATE: RATES}}, {"name": "c"}]
EQUIVALENT = {"name": "H1", "kind": "equivalent", "arms": ["a", "b"], "at": {RATE: 1e-3}, "margin_nats": 0.01}
BETTER = {"name": "H3", "kind": "better", "arms": ["a", "b"], "at": "own best"}
STABLE = {"name": "H2", "kind": "more_stable", "arms": ["a", "b"], "factor": 2}
Formula = Callable[[str, float, int], Given | None]


def verdicts(
    folder: Path, hypotheses: list[dict[str, Any]], given: Formula, seeds: int = 6, **keys: Any
) -> list[Verdict]:
    """Judge hypotheses by results that are a formula of (arm, rate, seed)."""
    runs = {"runs": ARMS[:2], **keys}
    file = write_suite(folder, hypotheses=hypotheses, seeds=list(range(seeds)), **runs)

    def of_run(run: PlannedRun) -> Given | None:
        return given(run.arm, run.swept.get(RATE, 0.0), run.seed)

    suite = with_results(load_suite(file), [write_results(folder / "results.json", file, of_run)])
    return judge(suite.hypotheses, records(suite))


def given(gap: float, deviation: float = 0.008) -> Formula:
    """Give arm b a loss that is higher by `gap`; the differences over seeds have exactly this deviation."""
    noise = np.random.default_rng(6).normal(size=6)
    noise = deviation * (noise - noise.mean()) / noise.std(ddof=1)

    def formula(arm: str, rate: float, seed: int) -> Given:
        shared = 0.1 * math.sin(seed)  # of both arms, so that pairs matter
        loss = valley(rate, 2e-3, 4.0) + shared + (gap + noise[seed] if arm == "b" else 0.0)
        return {"loss": loss, "halves": [loss, loss]}

    return formula


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """The interval is what six seeds of deviation 0.008 give: ±0.0084 nats."""
    (one,) = verdicts(tmp_path, [BETTER], given(0.02))
    assert one.finding.effect == "-0.0200 nats (-0.0284 to -0.0116)" and one.word == "held"
    assert one.adjusted == one.finding.p == pytest.approx(2 * stats.t.sf(0.02 / (0.008 / math.sqrt(6)), 5))


@pytest.mark.parametrize(
    ("gap", "better", "equivalent"),
    [
        (0.02, "held", "did not hold"),
        (-0.02, "did not hold", "did not hold"),
        (0.0, "not decided", "held"),
        (0.006, "not decided", "not decided"),
    ],
)
def test_verdicts(tmp_path: Path, gap: float, better: str, equivalent: str) -> None:
    wide = {**EQUIVALENT, "margin_nats": 0.0105}
    found = verdicts(tmp_path, [BETTER], given(gap, 0.007)) + verdicts(tmp_path, [wide], given(gap, 0.007))
    assert [one.word for one in found] == [better, equivalent]
    for one in found:
        assert ("if effect and deviation stay as they are" in one.reason) == (one.word == "not decided")


def test_the_seeds_that_are_needed_decide(tmp_path: Path) -> None:
    """Six seeds show 0.006 at a deviation of 0.008 seldom; the number that is named shows it four times out of five."""
    (one,) = verdicts(tmp_path, [BETTER], given(0.006))
    needed = int(one.reason.split(", ")[1].split()[0])
    draws = np.random.default_rng(7).normal(0.006, 0.008, (10_000, needed))
    share = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    assert 0.78 < share < 0.85
    assert one.reason.endswith("; 6 seeds find an effect of 0.0115 with that chance")


def test_a_value_that_was_chosen_is_judged_on_the_other_half(tmp_path: Path) -> None:
    def formula(arm: str, rate: float, seed: int) -> Given:
        first = valley(rate, 2e-3, 4.0) + (0.001 * seed if arm == "b" else 0.0)
        second = first + (0.02 if arm == "b" else 0.0)
        return {"loss": (first + second) / 2, "halves": [first, second]}

    (one,) = verdicts(tmp_path, [BETTER], formula)
    assert one.finding.effect.startswith("-0.0225 nats")


def test_p_values_are_adjusted_for_the_whole_file(tmp_path: Path) -> None:
    """Of three claims one has no p: it counts all the same."""
    nothing = {"name": "H0", "kind": "better", "arms": ["a", "b"], "at": {RATE: 4e-3}}

    def formula(arm: str, rate: float, seed: int) -> Given | None:
        return given(0.012)(arm, rate, seed) if rate < 4e-3 or seed == 0 else None

    found = verdicts(tmp_path, [{**BETTER, "at": {RATE: 2e-3}}, EQUIVALENT, nothing], formula)
    assert found[0].finding.p is not None and found[0].adjusted == pytest.approx(3 * found[0].finding.p)
    assert found[2].finding.p is None and found[2].reason == (
        "5 of 6 runs of a are unfinished; 5 of 6 runs of b are unfinished"
    )


@pytest.mark.parametrize(("family", "word"), [(1, "did not hold"), (4, "not decided")])
def test_the_opposite_of_a_claim_is_corrected_for_the_family_too(family: int, word: str) -> None:
    hypothesis = Hypothesis("H1", "equivalent", ("a", "b"), margin_nats=0.01)
    assert _verdict(hypothesis, Finding("-", p=0.9, p_against=0.02), 0.9, family).word == word


def test_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    for one in verdicts(tmp_path, [EQUIVALENT, STABLE, BETTER], given(0.02), seeds=1):
        assert (one.word, one.finding.p, one.reason) == ("not decided", None, "one seed: no interval and no verdict")


def test_no_claim_is_made_at_the_edge_of_a_sweep(tmp_path: Path) -> None:
    def formula(arm: str, rate: float, seed: int) -> Given:
        loss = valley(rate, 2e-3 if arm == "a" else 1e-2, 4.0) + 0.001 * seed * rate / 1e-3
        return {"loss": loss, "halves": [loss, loss]}

    (one,) = verdicts(tmp_path, [BETTER], formula)
    assert one.word == "not decided" and one.reason == "the best value of b, 0.004, is at the edge of its sweep"


def test_stability_counts_lost_runs_by_seed(tmp_path: Path) -> None:
    """Arm b loses its runs at 4e-3, arm a none: with six seeds p = 2 / 2^6."""

    def formula(arm: str, rate: float, seed: int) -> Given:
        if arm == "b" and rate == 4e-3:
            return {"detail": "step 3: the loss is nan"}
        return given(0.0)(arm, rate, seed)

    (one,) = verdicts(tmp_path, [STABLE], formula)
    assert one.finding.p == pytest.approx(2 / 2**6) and one.word == "held"
    assert one.finding.effect == "0 of 18 runs lost against 6 of 18; largest stable value ≥ 0.004 against 0.002"
    (open_end,) = verdicts(tmp_path, [{**STABLE, "factor": 3}], formula)
    assert open_end.reason == "a is stable to the end of its sweep; try larger values"
    assert verdicts(tmp_path, [{**STABLE, "arms": ["b", "a"]}], formula)[0].word == "did not hold"
    (at,) = verdicts(tmp_path, [{"name": "H", "kind": "more_stable", "arms": ["a", "b"], "at": {RATE: 4e-3}}], formula)
    assert at.finding.effect == "0 of 6 runs lost against 6 of 6" and at.finding.p == pytest.approx(2 / 2**6)
    (few,) = verdicts(tmp_path, [STABLE], formula, seeds=3)
    assert few.word == "not decided" and few.reason == "at least 6 seeds are needed, and all must agree"


def test_a_collapse_without_nan_counts_where_the_claim_says_so(tmp_path: Path) -> None:
    def formula(arm: str, rate: float, seed: int) -> Given:
        return given(0.5 if rate == 4e-3 else 0.0)(arm, rate, seed)

    assert verdicts(tmp_path, [STABLE], formula)[0].finding.effect.startswith("0 of 18 runs lost against 0 of 18")
    within = {**STABLE, "within_nats": 0.3}
    assert verdicts(tmp_path, [within], formula)[0].finding.effect.startswith("0 of 18 runs lost against 6 of 18")


def test_lost_runs_are_named_where_they_count(tmp_path: Path) -> None:
    def formula(arm: str, rate: float, seed: int) -> Given:
        return {"detail": "nan"} if (arm, seed) == ("b", 3) else given(0.02)(arm, rate, seed)

    (one,) = verdicts(tmp_path, [{**BETTER, "at": {RATE: 2e-3}}], formula)
    assert one.finding.note == "1 lost runs of b count as ln V." and one.word == "not decided"


def test_the_gap_over_budgets_is_a_slope_of_each_seed(tmp_path: Path) -> None:
    """The gap falls by 0.01 nats a doubling, give or take a part that is the seed's own."""
    budgets = [256 * 10, 256 * 20, 256 * 40]
    runs = [{"name": name, "budgets_tokens": budgets} for name in ("a", "b")]
    claim = {"name": "H4", "kind": "gap_shrinks", "arms": ["a", "b"]}
    file = write_suite(tmp_path, hypotheses=[claim], seeds=[1, 2, 3], runs=runs)
    suite = load_suite(file)
    noise = {1: -0.002, 2: 0.0, 3: 0.002}
    rows: dict[str, Given] = {}
    for run in suite.runs:
        for stage in run.stages:
            doublings = math.log2(stage.config.train_steps / 10)
            gap = 0.08 + (noise[run.seed] - 0.01) * doublings
            rows[str(stage.folder)] = {"loss": 4.0 - 0.2 * doublings + (gap if run.arm == "b" else 0.0)}
    saved = tmp_path / "results.json"
    write_results(saved, suite, lambda run: {"loss": 0.0})
    tree = json.loads(saved.read_text())
    for row in tree["results"]:
        row.update(rows[str(suite.output / row["run"])])
    saved.write_text(json.dumps(tree))
    suite = with_results(suite, [saved])
    (one,) = judge(suite.hypotheses, records(suite))
    half = stats.t.ppf(0.975, 2) * 0.002 / math.sqrt(3)
    assert one.finding.effect == (
        "gap +0.0800 nats at 0.00256M tokens, +0.0600 at 0.0102M; "
        f"-0.0100 nats a doubling ({-0.01 - half:+.4f} to {-0.01 + half:+.4f})"
    )
    assert one.word == "held" and one.finding.p == pytest.approx(2 * stats.t.sf(0.01 / (0.002 / math.sqrt(3)), 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "best"}, 'kind = "best" must be one of equivalent, better'),
        ({"name": ""}, 'name = "" must be a line of text'),
        ({"arms": ["a"]}, r'arms = \["a"\] must be two arms'),
        ({"arms": ["a", "x"]}, '"x" is no arm of the suite; its arms are a, b, c'),
        ({"arms": ["a", ["b"]]}, "is no arm of the suite"),
        ({"at": {RATE: 3e-3}}, 'no run of a has {"optimizer.learning_rate": 0.003}'),
        ({"at": {"model.num_layers": 2}}, "3 values of a have .*; name one"),
        ({"at": 3}, 'at = 3 must be "own best" or values of keys'),
        ({"at": {"rate": 3}}, 'must be "own best" or values of keys'),
        ({"at": None}, "at is missing, and a has 3 values"),
        ({"at": "own best", "arms": ["a", "c"]}, "does not fit, since c sweeps nothing"),
        ({"margin_nats": 0}, "margin_nats = 0 must be a positive number"),
        ({"factor": 2}, "'factor' is no key of kind equivalent"),
        ({"claim": 5}, "claim = 5 must be a line of text"),
        ({**STABLE, "at": {RATE: 1e-3}}, "factor compares whole sweeps, and at chooses given runs"),
        ({**STABLE, "arms": ["a", "c"]}, "factor compares whole sweeps, and c sweeps nothing"),
        ({"kind": "gap_shrinks", "tokens": 100}, "tokens does not fit"),
    ],
)
def test_faulty_hypotheses_are_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    hypothesis = change if change.get("kind") == "more_stable" else {**EQUIVALENT, **change}
    file = write_suite(tmp_path, runs=ARMS, hypotheses=[hypothesis])
    with pytest.raises(SuiteError, match=words):
        load_suite(file)


def test_two_hypotheses_of_one_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="two hypotheses are called H1"):
        load_suite(write_suite(tmp_path, runs=ARMS, hypotheses=[EQUIVALENT, EQUIVALENT]))
    without = {key: value for key, value in EQUIVALENT.items() if key != "margin_nats"}
    with pytest.raises(SuiteError, match="margin_nats is missing"):
        load_suite(write_suite(tmp_path, runs=ARMS, hypotheses=[without]))
