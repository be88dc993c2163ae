"""Fits recover what made the points, crossings and optima what algebra says, and bad points get one clear line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from model.config import ARCHITECTURES
from train.cost.flops import training_flops_per_token
from train.scaling.__main__ import main
from train.scaling.analysis import compute_optimal, exponents, held_out, isoflops, power_law
from train.scaling.compare import Curve, along_ladder, compare
from train.scaling.ladder import learning_rate, plan
from train.scaling.law import DELTA, FitError, LossLaw, bootstrap, fit, interval
from train.scaling.outliers import outliers
from train.scaling.points import Points, PointsError, points_of, read_csv, write_csv
from train.scaling.source import load_series
from train.study.suite import load_suite

CHINCHILLA = LossLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # arXiv 2203.15556
OTHER = LossLaw(E=1.95, A=250.0, alpha=0.33, B=330.0, beta=0.28)


def made_points(law: LossLaw, noise: float, count: int = 120, seed: int = 0, name: str = "made") -> Points:
    random = np.random.default_rng(seed)
    n = np.exp(random.uniform(math.log(5e7), math.log(1e10), count))
    d = n * np.exp(random.uniform(math.log(3), math.log(100), count))
    losses = law.loss(n, d) * np.exp(noise * random.standard_normal(count))
    return Points(name, n, d, losses, 6 * n * d)


def test_exact_points_give_their_law_back() -> None:
    points = made_points(CHINCHILLA, noise=0.0)
    found = fit(points.parameters, points.tokens, points.losses)
    assert list(found.law.as_row().values()) == pytest.approx(list(CHINCHILLA.as_row().values()), rel=1e-6)
    assert found.starts == 4500 and found.agreeing == 40


def test_noisy_points_give_it_back_within_the_intervals() -> None:
    inside = 0
    for seed in range(4):
        points = made_points(CHINCHILLA, noise=0.004, seed=seed)
        found = fit(points.parameters, points.tokens, points.losses)
        laws = bootstrap(found.law, points.parameters, points.tokens, points.losses, resamples=200, seed=seed)
        for key, true in CHINCHILLA.as_row().items():
            low, high = interval([getattr(law, key) for law in laws])
            assert low < getattr(found.law, key) < high
            inside += low <= true <= high
    assert inside >= 15, f"{inside} of 20 true coefficients lie in their 95% intervals"


def test_the_fit_is_the_minimum_that_another_optimizer_finds() -> None:
    """Written anew, without the derivative, from the published values; outliers included."""
    points = made_points(CHINCHILLA, noise=0.01, count=60)
    losses = points.losses.copy()
    losses[::15] *= 1.2

    def objective(theta: np.ndarray) -> float:
        a, b, e, alpha, beta = theta
        terms = [a - alpha * np.log(points.parameters), b - beta * np.log(points.tokens), e + 0 * points.tokens]
        size = np.abs(np.logaddexp.reduce(terms, axis=0) - np.log(losses))
        return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum() / DELTA)

    start = [math.log(406.4), math.log(410.7), math.log(1.69), 0.34, 0.28]
    other = minimize(
        objective, start, method="Nelder-Mead", options={"maxiter": 20000, "maxfev": 20000, "fatol": 1e-12}
    )
    found = fit(points.parameters, points.tokens, losses)
    assert found.objective / DELTA <= other.fun * (1 + 1e-6)


def with_strays(points: Points, count: int) -> Points:
    """The first points moved to few tokens a parameter and 8% to 40% above the law: far, and with much leverage."""
    n, d, losses = points.parameters.copy(), points.tokens.copy(), points.losses.copy()
    n[:count] = np.linspace(2e9, 7e9, count)
    d[:count] = n[:count] * np.linspace(0.6, 0.05, count)
    losses[:count] = CHINCHILLA.loss(n[:count], d[:count]) * np.linspace(1.08, 1.4, count)
    return Points(points.name, n, d, losses, 6 * n * d)


def test_outliers_are_told_from_the_rest_and_bend_the_law_no_more() -> None:
    points = with_strays(made_points(CHINCHILLA, noise=0.004, count=40), 4)
    law = fit(points.parameters, points.tokens, points.losses).law
    found = outliers(points, law)
    assert list(np.flatnonzero(found.far)) == list(range(4)) and (found.deviations[:4] > 0).all()
    assert found.spread == pytest.approx(0.004, rel=0.25)
    assert abs(found.law.beta - 0.28) < 0.01 < abs(law.beta - 0.28)
    for count in (10, 30, 120):
        points = made_points(CHINCHILLA, noise=0.01, count=count, seed=count)
        law = fit(points.parameters, points.tokens, points.losses).law
        assert not outliers(points, law).far.any(), "noise alone has none"


def test_fit_lists_outliers_and_leaves_them_out_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, laws = tmp_path / "made.csv", tmp_path / "laws.json"
    few = points_of("few", [(1e8, 1e9, 3.0, 6e17)])
    write_csv(file, [with_strays(made_points(CHINCHILLA, noise=0.004, count=40), 4), few])
    betas = {}
    for option in ([], ["--without-outliers"]):
        assert main(["fit", str(file), "--resamples", "20", "--output", str(laws), *option]) == 0
        row = json.loads(laws.read_text())["architectures"]["made"]
        betas[len(row["left_out"])] = row["beta"], row["points"]
    out = capsys.readouterr().out
    assert "4 points lie more than 6 robust standard deviations" in out and "Left out: 4 outliers" in out
    assert "few: no law: 1 points" in out, "what has a law is not lost with what has none"
    assert betas[0][1] == 40 and betas[1][1] == 36 and abs(betas[1][0] - 0.28) < 0.01 < abs(betas[0][0] - 0.28)
    assert main(["report", str(file), "--resamples", "20", "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| made, outliers left out |" in text and "tokens/parameter" in text and "few: no law" in text


@pytest.mark.parametrize(
    ("n", "d", "losses", "words"),
    [
        ([1e6] * 6, [1e7, 2e7, 3e7, 4e7, 5e7, 6e7], [3.0] * 6, "1 sizes"),
        ([1e6, 2e6, 3e6, 4e6], [1e7, 2e7, 3e7, 4e7], [3.0] * 4, "4 points"),
        ([1e6, 2e6, 3e6, 4e6, 5e6], [1e7, 2e7, 3e7, 4e7, 5e7], [3.0, 3.0, math.nan, 3.0, 3.0], "finite"),
    ],
)
def test_points_that_determine_nothing(n: list, d: list, losses: list, words: str) -> None:
    with pytest.raises(FitError, match=words):
        fit(n, d, losses)


def test_compute_optimal_agrees_with_the_closed_form() -> None:
    budgets = np.array([1e19, 1e21, 1e23])
    found = compute_optimal(CHINCHILLA, budgets)
    law = CHINCHILLA
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    assert found.parameters == pytest.approx(g * (budgets / 6) ** exponents(law)[0], rel=1e-4)
    assert found.parameters * found.tokens == pytest.approx(budgets / 6)
    assert power_law(budgets, found.parameters)[0] == pytest.approx(exponents(law)[0], abs=1e-4)


def test_isoflop_minima_lie_at_the_optimum() -> None:
    rows = []
    for compute in (1e19, 1e20, 1e21):
        best = compute_optimal(CHINCHILLA, compute).parameters[0]
        for factor in (0.5, 0.7, 1.0, 1.4, 2.0):
            n = best * factor
            rows.append((n, compute / 6 / n, float(CHINCHILLA.loss(n, compute / 6 / n)), compute))
    curves = isoflops(points_of("grid", rows))
    assert [curve.flops for curve in curves] == pytest.approx([1e19, 1e20, 1e21])
    optimum = compute_optimal(CHINCHILLA, [1e19, 1e20, 1e21]).parameters
    assert [curve.best_parameters for curve in curves] == pytest.approx(optimum, rel=0.05)


def test_isoflops_are_interpolated_where_no_budgets_coincide() -> None:
    rows = []
    for n in np.geomspace(1e7, 1e8, 7):
        for ratio in np.geomspace(1, 400, 9):
            rows.append((n, n * ratio, float(CHINCHILLA.loss(n, n * ratio)), 6 * n * n * ratio * (1 + 1e-3 * ratio)))
    curves = isoflops(points_of("ladder", rows))
    assert curves
    for curve in curves:
        optimum = compute_optimal(CHINCHILLA, curve.flops).parameters[0]
        assert curve.best_parameters == pytest.approx(optimum, rel=0.3)


def test_held_out_runs_are_the_dearest_and_predicted() -> None:
    points = made_points(CHINCHILLA, noise=0.0)
    found = held_out(points, share=0.25)
    assert found is not None and len(found.points) == 30
    assert found.points.flops.min() > np.median(points.flops)
    assert np.abs(found.relative_errors).max() < 1e-5
    assert held_out(points.where(np.arange(120) < 5)) is None


def test_two_laws_cross_where_they_are_equal() -> None:
    sizes = np.array([1e6, 1e9])
    curves = [
        Curve(name, law, [law] * 3, lambda n: 6 * n, along_ladder(sizes, gigabytes))
        for name, law, gigabytes in (("OTHER", OTHER, [0.1, 100.0]), ("CHINCHILLA", CHINCHILLA, [1.0, 1000.0]))
    ]
    found = compare(*curves, (1e6, 1e12), (1e8, 1e14), (1e15, 1e24), (1e9, 1e11))
    by_axis = {crossing.axis.split()[0]: crossing for crossing in found}
    for crossing in found:
        assert crossing.below == "OTHER" and len(crossing.at) == 1, "it ends at the higher loss"
        assert crossing.interval == pytest.approx((crossing.at[0],) * 2) and crossing.share == 1.0
    n, d = by_axis["parameters"].at[0], by_axis["tokens"].at[0]
    assert OTHER.loss(n, 1e11) == pytest.approx(CHINCHILLA.loss(n, 1e11), rel=1e-4)
    assert OTHER.loss(1e9, d) == pytest.approx(CHINCHILLA.loss(1e9, d), rel=1e-4)
    gigabytes = by_axis["communication"].at[0]  # OTHER's communication is 1e-7 N, CHINCHILLA's 1e-6 N
    assert OTHER.loss(gigabytes / 1e-7, 1e11) == pytest.approx(CHINCHILLA.loss(gigabytes / 1e-6, 1e11), rel=1e-3)
    never = compare(curves[0], curves[0], (1e6, 1e9), (1e8, 1e11), (1e15, 1e20), (1e8, 1e10))
    assert all(not crossing.at for crossing in never)


def test_measured_gaps_compare_equal_sizes_and_lengths(tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    rows = [(name, n, d, float(law.loss(n, d))) for name, law, sizes in (("A", OTHER, (2e7, 4e7, 9e9)),
            ("B", CHINCHILLA, (1e7, 3e7, 8e7))) for n in sizes for d in (1e9, 4e9, 1e10)]  # fmt: skip
    file.write_text("arch,N,D,loss\n" + "".join(f"{name},{n},{d},{loss}\n" for name, n, d, loss in rows))
    assert main(["report", str(file), "--resamples", "5", "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    share = math.log(2) / math.log(3)  # of the way from 1e7 to 3e7
    between = (1 - share) * CHINCHILLA.loss(1e7, 4e9) + share * CHINCHILLA.loss(3e7, 4e9)
    gaps = text[text.index("## A against B") :]
    row = next(line for line in gaps.splitlines() if line.startswith("| 20,000,000 |"))
    assert row.split("|")[3].strip() == f"{float(OTHER.loss(2e7, 4e9) - between):+.3f}"
    assert "| 9,000,000,000 |" not in gaps, "B has no such size"
    assert "at 1e+10 tokens" in gaps and "at 8e+07 parameters" in gaps


def test_csv_is_read_under_the_names_people_use(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text('\ufeff,Model Size,Training FLOP,loss\n0,1.5B,9e19,2.5\n1,"400,000,000",2.4e18,3.5\n')
    (points,) = read_csv(file)
    assert points.name == "points" and list(points.parameters) == [1.5e9, 4e8]
    assert list(points.tokens) == pytest.approx([1e10, 1e9]) and list(points.losses) == [2.5, 3.5]
    write_csv(file, [points, made_points(OTHER, 0.0, 5, name="other")])
    first, second = read_csv(file)
    assert list(first.tokens) == pytest.approx([1e10, 1e9]) and (first.name, len(second)) == ("points", 5)
    file.write_text("size_b,tok,log ppl\n1e9,1e10,3\n")
    (points,) = read_csv(file, {"N": "size_b", "D": "tok", "loss": "log ppl"})
    assert list(points.flops) == [6e19] and (points.unit, first.unit) == ("log ppl", "nats a token")


def test_losses_are_told_in_the_unit_of_their_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, laws = tmp_path / "made.csv", tmp_path / "laws.json"
    write_csv(file, [made_points(CHINCHILLA, 0.003, 20)])
    file.write_text(file.read_text().replace("loss", "bits per byte"))
    given = [str(file), "--columns", "loss=bits per byte", "--resamples", "5", "--output"]
    assert main(["fit", *given, str(laws)]) == 0 and main(["report", *given, str(tmp_path / "report")]) == 0
    assert main(["predict", str(laws), "--parameters", "1e9", "--tokens", "2e10"]) == 0
    out = capsys.readouterr().out + (tmp_path / "report" / "report.md").read_text()
    assert "(bits per byte) [" in out and out.count("losses in bits per byte") == 2 and "nats" not in out
    tree = json.loads(laws.read_text())
    del tree["architectures"]["made"]["loss_unit"]  # as earlier versions wrote it
    laws.write_text(json.dumps(tree))
    assert main(["predict", str(laws), "--parameters", "1e9", "--tokens", "2e10"]) == 0
    assert "(nats a token) [" in capsys.readouterr().out
    file.write_text(file.read_text().replace("bits per byte", "Perplexity"))
    assert main(["fit", str(file), "--columns", "loss=Perplexity"]) == 2
    assert "column 'Perplexity' holds perplexities" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_law_that_means_nothing_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n, d = (values.ravel() for values in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    file, folder = tmp_path / "made.csv", tmp_path / "report"
    for losses, words in (
        (np.full(16, 3.0), "all losses lie within 0.1%"),
        (2 + 410 * d**-0.28 + 1e-4 * n**-0.3, "alpha ="),
        (2 + n**0.03 + 410 * d**-0.28, "losses do not fall with parameters"),
        (406 * n**-0.34 + 410 * d**-0.28, "E = "),
    ):
        write_csv(file, [Points("made", n, d, losses, 6 * n * d)])
        assert main(["fit", str(file), "--resamples", "5"]) == 0
        assert words in capsys.readouterr().out.partition("warning: made: ")[2]
        assert main(["report", str(file), "--resamples", "5", "--output", str(folder)]) == 0
        assert words in (folder / "report.md").read_text().partition("**Warning**: made: ")[2]
    write_csv(file, [made_points(CHINCHILLA, 0.003, 20)])
    capsys.readouterr()
    assert main(["fit", str(file), "--resamples", "5"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("fit", ["--resamples", "0"], "--resamples: '0': expected a whole number from 1"),
        ("report", ["--resamples", "-3"], "--resamples: '-3': expected a whole number from 1"),
        ("fit", ["--least-ratio", "nan"], "--least-ratio: 'nan'"),
        ("fit", ["--output", "."], "--output .: is a folder; name a file"),
        ("fit", ["--output", "few.csv/x"], "--output few.csv/x: few.csv is no folder"),
        ("fit", ["--output", "few.csv"], "--output few.csv: is the file that is read"),
        ("report", ["--output", "few.csv"], "--output few.csv: is a file; name a folder"),
        ("report", [], "few: no law: 1 points"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(
    command: str,
    given: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("few.csv"), [points_of("few", [(1e8, 1e9, 3.0, 6e17)])])
    assert status_of([command, "few.csv", *given]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


LAW = {**CHINCHILLA.as_row(), "resamples": [[1.69, 406, 0.34, 410, 0.28]], "range_parameters": [1e7, 1e9],
       "range_tokens": [1e9, 1e11]}  # fmt: skip
SIZE = ["--parameters", "1e8", "--tokens", "1e10"]


@pytest.mark.parametrize(
    ("tree", "given", "words"),
    [
        (None, SIZE, "no such file"),
        ([], SIZE, "has no architectures"),
        ({"architectures": []}, SIZE, "has no architectures"),
        ({"architectures": {}}, SIZE, "has no architectures"),
        ({"architectures": {"A": 3}}, SIZE, "A: expected an object"),
        ({"architectures": {"A": {**LAW, "resamples": []}}}, SIZE, "A: resamples: expected a list"),
        ({"architectures": {"A": {**LAW, "resamples": "abcde"}}}, SIZE, "A: resamples: expected a list"),
        ({"architectures": {"A": {**LAW, "alpha": "0.3"}}}, SIZE, "A: E, A, alpha, B, beta: expected 5 finite"),
        ({"architectures": {"A": {**LAW, "E": math.nan}}}, SIZE, "NaN is not JSON"),
        ({"architectures": {"A": {**LAW, "range_tokens": None}}}, SIZE, "A: range_tokens: expected 2 finite"),
        ({"architectures": {"A": LAW}}, ["--flops", "1e20", "--parameters", "1e8"], "either --flops alone"),
        ({"architectures": {"A": LAW}}, ["--parameters", "1e8"], "either --flops alone"),
        ({"architectures": {"A": LAW}}, ["--flops", "nan"], "--flops: 'nan': expected a number from 1 to 1e+30"),
        ({"architectures": {"A": LAW}}, ["--flops", "inf"], "--flops: 'inf'"),
        ({"architectures": {"A": LAW}}, ["--flops", "0"], "--flops: '0'"),
        ({"architectures": {"A": LAW}}, ["--parameters", "0"], "--parameters: '0'"),
    ],
)
def test_a_prediction_of_nothing_is_refused(
    tree: object, given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "laws.json"
    if tree is not None:
        file.write_text(json.dumps(tree))
    assert status_of(["predict", str(file), *given]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_prediction_says_where_it_has_no_ground(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "laws.json"
    file.write_text(json.dumps({"architectures": {"A": LAW}}))
    notes = []
    for given in (SIZE, ["--flops", "1e24"], ["--flops", "1"]):
        assert main(["predict", str(file), *given]) == 0
        notes.append(capsys.readouterr().out.partition(" tokens")[2].strip())
    assert notes == ["", "(extrapolated)", "(no optimum among the 10000 to 1e+14 parameters searched)"]


def status_of(arguments: list[str]) -> int:
    """The exit status, also where argparse decides it."""
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("text", "names", "remarks"),
    [
        ("Params (M)\tTokens (billions)\tval loss\n70\t1.5\t3.5\n160M\t3\t3.25\n", ["bits"], ()),
        ("name,N,D,loss\na,7e7,1e9,3.5\nb,1.6e8,1e9,3.2\n", ["bits"], ()),  # each names a run
        ("model,N,D,loss\nx,7e7,1e9,3.5\nx,1.6e8,1e9,3.2\ny,7e7,1e9,3.4\n", ["x", "y"], ()),
        ("N,D,loss\n7e7,1e9,3.5\n\n1e8,1e9,\n1e8,1e9,nan\n", ["bits"],
         ("2 rows without a value left out (lines 4, 5)",)),
        ("N,D,loss\n7e7,1e9,3.5\n7e7,1e9,3.5\n", ["bits"], ("1 points repeat another to the last digit; each counts",)),
    ],
)  # fmt: skip
def test_csv_as_people_publish_it(tmp_path: Path, text: str, names: list[str], remarks: tuple) -> None:
    file = tmp_path / "bits.csv"
    file.write_text(text)
    found = read_csv(file)
    assert [points.name for points in found] == names
    assert found[0].parameters[0] == 7e7 and found[0].losses[0] == 3.5 and found[0].remarks == remarks
    assert found[0].tokens[0] == (1.5e9 if "billions" in text else 1e9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("N,D,loss\n1e9,1e10,0\n", "line 2, column loss"),
        ("N;D;loss\n1e9;1e10;3,5\n", "line 2, column loss: '3,5'"),
        ("N,D,loss\n1e9,,3\n", "not one row has a value"),
        ("N,D,loss\n70,1e9,3\n", "line 2, column N: comes to 70"),
        ("N,D,loss\n1e9,1e308,3\n", "line 2, column D: comes to 1e\\+308"),
        ("N,D,loss\n1e9,1e10,1e308\n", "line 2, column loss: 1e\\+308 is no loss"),
        ("N,D,C,loss\n1e9,1e10,1e308,3\n", "line 2, column C: 1e\\+308 is no count"),
        ("N,loss\n1e9,3\n", "no column for D"),
        ("a,b\n1,2\n", "no column for N, loss, D"),
        ("N,D,loss\n", "no rows"),
        ("", "no rows"),
        ("N,D,loss\n1e7,5e8,3.5\n\n10000000,5e7,3,45\n", "line 4 has 4 cells and the header 3"),
        ("N,D,loss\n1e7,5e8\n", "line 2 has 2 cells and the header 3"),
        ("N,N,D,loss\n1e7,2e7,5e8,3.5\n", "2 columns are called 'N'"),
    ],
)
def test_a_bad_csv_gets_one_line(tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(PointsError, match=words):
        read_csv(file)
    assert main(["fit", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_ladder_keeps_to_its_budget_and_its_suite_loads(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    arguments = ["--sizes", "4", "--ratios", "2", "40", "--levels", "9", "--data", "nowhere", "--vocab-size", "4096"]
    assert main(["plan", "--flops", "2e17", *arguments, "--rates", "0.5", "1", "--output", str(file)]) == 0
    rungs = plan(["EReg(SM(t)+ScFuFFN)", "SM+LN+G"], 2e17, 4, [2, 40], 4096, 128, levels=9)
    suite = load_suite(file)
    assert len(suite.runs) == len(rungs) + 2  # the smallest of each architecture at another rate
    results = {}
    for run in suite.runs:
        model = run.stages[0].config.model
        steps = sum(
            stage.config.train_steps - (stage.copied_step or before)
            for stage, before in zip(run.stages, trunk_steps(run.stages), strict=True)
        )
        results[run.label] = steps * run.stages[0].config.tokens_per_step * training_flops_per_token(model, 4096)
    counted = {one.name: one.flops for one in rungs}
    assert {name: results[name] for name in counted} == pytest.approx(counted, rel=0.02)
    assert sum(counted.values()) <= 2e17
    compute = [tokens * training_flops_per_token(one.model, 4096) for one in rungs for tokens in one.budgets_tokens]
    levels = np.unique(np.round(np.log(compute), 1))
    assert len(levels) < len(compute) - 4, "sizes share levels of compute"
    with pytest.raises(SystemExit):
        main(["plan", "--flops", "1e15"])
    assert main(["plan", "--flops", "1e9", *arguments, "--output", str(file)]) == 2


def test_a_planned_suite_has_whole_steps_and_names_that_differ(tmp_path: Path) -> None:
    file = tmp_path / "new" / "suite.json"
    given = ["plan", "--sizes", "1", "--vocab-size", "4096", "--data", "nowhere", "--output", str(file)]
    given += ["--architectures", *ARCHITECTURES, "--seq-length", "100", "--micro-batch-tokens", "5000"]
    assert main([*given, "--flops", "1e20"]) == 0
    suite = load_suite(file)
    assert len({run.label for run in suite.runs}) == len(ARCHITECTURES)
    assert {"EReg-", "SM-", "SMt+ScFuFFN-"} <= {run.label.partition("-")[0] + "-" for run in suite.runs}
    for entry, run in zip(json.loads(file.read_text())["runs"], suite.runs, strict=True):
        config = run.stages[0].config
        assert config.training.global_batch_size % config.training.micro_batch_size == 0
        assert config.training.micro_batch_size == min(32, config.training.global_batch_size)
        assert not any(tokens % config.tokens_per_step for tokens in entry["budgets_tokens"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--architectures", "SM", "SM"], "--architectures names SM twice"),
        (["--rates", "1", "1.0"], "--rates names 1.0 twice"),
        (["--rates", "2", "2.0000001"], "two runs are called SM-3x192-rate2/seed1"),
        (["--rates", "-1"], "--rates: '-1': expected a number from 0.001 to 1000"),
        (["--rates", "nan"], "--rates: 'nan'"),
        (["--flops", "inf"], "--flops: 'inf': expected a number from 1 to 1e+30"),
        (["--vocab-size", "0"], "--vocab-size: '0'"),
        (["--micro-batch-tokens", "0"], "--micro-batch-tokens: '0'"),
        (["--levels", "-1"], "--levels: '-1'"),
        (["--sizes", "-2"], "--sizes: '-2': expected a whole number from 1 to 14"),
        (["--ratios", "0"], "--ratios: '0'"),
        (["--seq-length", "-5"], "--seq-length: '-5'"),
        (["--name", ""], "--name: ''"),
        (["--name", "../x"], "--name: '../x': expected a folder's name"),
        (["--output", "."], "--output .: is a folder"),
    ],
)
def test_a_plan_of_what_cannot_run_is_refused(
    wrong: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suite.json"
    given = ["plan", "--architectures", "SM", "--sizes", "1", "--flops", "1e15", "--vocab-size", "64", "--data", "no"]
    status = status_of([*given, "--output", str(file), *wrong])
    assert status == 2 and words in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_run_takes_what_the_study_program_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--jobs", "2", str(tmp_path / "none.json")]) == 2
    assert "no such suite file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0 and "--jobs" in capsys.readouterr().out


def trunk_steps(stages: tuple) -> list[int]:
    """Steps that a trunk stage finds done."""
    done, before = 0, []
    for stage in stages:
        before.append(done if stage.copied_from is None else 0)
        if stage.copied_from is None:
            done = stage.config.train_steps
    return before


def test_a_suite_averages_seeds_and_takes_the_best_of_swept_rates(tmp_path: Path) -> None:
    model = {"architecture": "SM", "num_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "seq_length": 8}
    tree = {
        "model": model, "data": {"path": "nowhere", "planned_vocab_size": 64},
        "training": {"train_steps": 2, "global_batch_size": 2, "micro_batch_size": 1},
    }  # fmt: skip
    file = tmp_path / "suite.json"
    runs = [{"name": name, "config": tree} for name in ("SM", "SM-rate2")]
    file.write_text(json.dumps({"name": "made", "output": str(tmp_path), "seeds": [1, 2, 3], "runs": runs}))
    for label, losses in (("SM", (3.0, 3.2, 3.4)), ("SM-rate2", (2.9, 3.6, 3.7))):
        for seed, loss in enumerate(losses, start=1):
            folder = tmp_path / label / f"seed{seed}"
            folder.mkdir(parents=True)
            rows = [{"step": 2, "loss": 3.0}, {"step": 2, "validation_loss": loss}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (series,) = load_series(file, "total")
    assert series.points.losses == pytest.approx([3.2]), "not 2.9, the luckiest seed of the worse rate"
    assert series.points.remarks == ("losses are means over up to 3 seeds",)


def test_the_learning_rate_falls_with_width_and_depth() -> None:
    assert learning_rate(12, 768) == 5e-4
    assert learning_rate(12, 1536) == pytest.approx(2.5e-4)
    assert learning_rate(48, 768) == pytest.approx(2.5e-4)
    assert learning_rate(28, 2560) == pytest.approx(1e-4, rel=0.03), "what configs/ereg_1b.json ships"
    assert json.loads(Path("configs/ereg_1b.json").read_text())["optimizer"]["learning_rate"] == 1e-4


def test_fit_predict_and_report_from_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, laws = tmp_path / "two.csv", tmp_path / "new" / "laws.json"
    series = [
        made_points(law, 0.003, 40, seed, name) for seed, (law, name) in enumerate(((OTHER, "A"), (CHINCHILLA, "B")))
    ]
    write_csv(file, series)
    assert main(["fit", str(file), "--resamples", "50", "--output", str(laws)]) == 0
    assert json.loads(laws.read_text())["architectures"]["B"]["alpha"] == pytest.approx(0.34, abs=0.05)
    capsys.readouterr()
    assert main(["predict", str(laws), "--parameters", "1e9", "--tokens", "2e10"]) == 0
    answer = capsys.readouterr().out.splitlines()
    assert float(answer[1].split()[1]) == pytest.approx(float(CHINCHILLA.loss(1e9, 2e10)), rel=0.01)
    assert main(["report", str(file), "--resamples", "50", "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "A against B" in text and "training FLOPs, each at its optimal size" in text
    assert (tmp_path / "report" / "report.html").stat().st_size > 50_000  # pictures inside
