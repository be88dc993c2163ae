"""Plan a ladder of runs, train it, fit a scaling law, predict from it, and report it:

    python -m train.scaling plan --flops 1e17 --data datasets/mine --output configs/suites/ladder.json
    python -m train.scaling run configs/suites/ladder.json
    python -m train.scaling fit configs/suites/ladder.json --output laws.json
    python -m train.scaling predict laws.json --parameters 1e9 --tokens 2e10
    python -m train.scaling report configs/suites/ladder.json --output docs/study/ladder

`fit` and `report` also read a CSV file of (N, D, loss). It holds one architecture, or several with a column
`architecture`.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.command_line import path_argument, print_faults, real_number, run_command, whole_number
from data.files.own import replacing, write_atomically
from data.files.strict_json import to_json
from model.config import ARCHITECTURES
from train.config.overrides import parse_with_overrides
from train.scaling.ladder import DEPTHS, LadderError, plan, suite_tree
from train.scaling.law import FitError
from train.scaling.points import NATS, PointsError
from train.study.suite import SuiteError, load_suite

if TYPE_CHECKING:
    from train.scaling.source import Series

MOST_FLOPS = 1e30


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        from train.study.__main__ import main as study

        return study(arguments)
    options = parse(arguments)
    try:
        return int(COMMANDS[options.command](options))
    except (LadderError, FitError, PointsError, SuiteError) as error:
        print_faults(error)
        return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.scaling", description="Scaling laws of an architecture.")
    commands = parser.add_subparsers(dest="command", required=True)
    _plan_options(
        commands.add_parser(
            "plan", help="plan a ladder of sizes and token budgets for a compute budget; write it as a suite"
        )
    )
    commands.add_parser("run", help="train the suite; the same as python -m train.study run")
    for name, help_text in (("fit", "fit the law and print its coefficients"), ("report", "write the report")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("source", type=path_argument, help="suite file (.json) or CSV file of points")
        command.add_argument("overrides", nargs="*", metavar="section.key=value",
                             help="overrides that the suite was run with")  # fmt: skip
        command.add_argument("--parameters", choices=("total", "body"), default="total",
                             help="what N counts: all, or without embeddings and head (default: total)")  # fmt: skip
        command.add_argument("--columns", nargs="+", default=[], metavar="KEY=COLUMN",
                             help="CSV column for N, D, C, loss or architecture, say N='Model Size'")  # fmt: skip
        command.add_argument("--least-ratio", type=real_number(0), default=0.0, metavar="R",
                             help="leave out points with fewer tokens a parameter (default: keep all)")  # fmt: skip
        command.add_argument("--without-outliers", action="store_true",
                             help="leave out points far off the law of the others; they are still listed")  # fmt: skip
        command.add_argument("--resamples", type=whole_number(1, 100_000), default=1000, metavar="N",
                             help="number of bootstrap resamples (default: 1000)")  # fmt: skip
        command.add_argument("--output", type=path_argument, metavar="PATH",
                             help="fit: file for predict; report: folder (default: report/ beside source)")  # fmt: skip
        command.add_argument("--note", default="", metavar="TEXT", help="a sentence for the top of the report")
    predict = commands.add_parser(
        "predict", help="predict the loss of a size and length, or the best ones for a compute budget"
    )
    predict.add_argument("fits", type=path_argument, metavar="FILE", help="file that fit --output wrote")
    predict.add_argument("--parameters", type=real_number(1), metavar="N", help="size; together with --tokens")
    predict.add_argument("--tokens", type=real_number(1, 1e18), metavar="D", help="length of the training")
    predict.add_argument(
        "--flops", type=real_number(1, MOST_FLOPS), metavar="C", help="training FLOPs, counted as 6 N D; alone"
    )
    return parse_with_overrides(parser, arguments)


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--flops", type=real_number(1, MOST_FLOPS), required=True, metavar="C",
                         help="training FLOPs of all runs together")  # fmt: skip
    command.add_argument("--architectures", nargs="+", default=["EReg(SM(t)+ScFuFFN)", "SM+LN+G"],
                         choices=list(ARCHITECTURES),
                         metavar="NAME", help="by the paper's names (default: EReg and SM+LN+G)")  # fmt: skip
    command.add_argument("--sizes", type=whole_number(1, len(DEPTHS)), default=5, metavar="N",
                         help="number of sizes of each architecture (default: 5)")  # fmt: skip
    command.add_argument("--ratios", type=real_number(1e-3, 1e6), nargs="+", default=[5, 10, 20], metavar="R",
                         help="token budgets, in tokens a parameter (default: 5 10 20)")  # fmt: skip
    command.add_argument("--levels", type=whole_number(0, 100), default=0, metavar="K",
                         help="evaluate all sizes at K common levels of compute, within --ratios")  # fmt: skip
    command.add_argument(
        "--counted",
        choices=("total", "body"),
        default="total",
        help="which parameters --ratios counts (default: total)",
    )
    command.add_argument("--seq-length", type=whole_number(1, 1 << 20), default=128, metavar="T",
                         help="context in tokens (default: 128)")  # fmt: skip
    command.add_argument(
        "--data", required=True, metavar="DIR", help="prepared dataset; its vocabulary counts as parameters"
    )
    command.add_argument("--vocab-size", type=whole_number(1, 10**7), metavar="V",
                         help="size of the vocabulary, if the dataset is not prepared yet")  # fmt: skip
    command.add_argument("--rates", type=real_number(1e-3, 1e3), nargs="+", default=[1.0], metavar="F",
                         help="factors of the learning rate to sweep at the smallest size (default: 1)")  # fmt: skip
    command.add_argument("--micro-batch-tokens", type=whole_number(1), default=65536, metavar="N",
                         help="largest micro-batch in tokens (default: 65536)")  # fmt: skip
    command.add_argument(
        "--name",
        type=_folder_name,
        default="ladder",
        help="name of the suite, which trains in runs/NAME (default: ladder)",
    )
    command.add_argument("--output", type=path_argument, required=True, metavar="FILE", help="suite file to write")


def _folder_name(text: str) -> str:
    """Check that a name can name a folder; an argparse type."""
    if not re.fullmatch(r"\w[\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a folder's name of letters, digits and . + - _")
    return text


def make_plan(options: argparse.Namespace) -> int:
    """Write a suite: a ladder of sizes and budgets."""

    from data.errors import DataError
    from data.stream.dataset import open_dataset

    for option in ("architectures", "rates"):
        given = getattr(options, option)
        if twice := next((value for value in given if given.count(value) > 1), None):
            raise LadderError(f"--{option} names {twice} twice; name it once")
    _check_output(options.output)
    vocab_size = options.vocab_size
    if vocab_size is None:
        try:
            vocab_size = open_dataset(options.data).vocab_size
        except DataError as error:
            raise LadderError(f"{error}; or say --vocab-size") from None
    rungs = plan(
        options.architectures,
        options.flops,
        options.sizes,
        options.ratios,
        vocab_size,
        options.seq_length,
        options.counted,
        options.levels,
    )
    tree = suite_tree(options.name, rungs, options.data, options.micro_batch_tokens, options.rates)
    _write_suite(options.output, tree)
    print(f"{'size':22} {'parameters':>11} {'body':>11} {'rate':>8} {'tokens a step':>13}  budgets (M tokens)")
    for one in rungs:
        budgets = " ".join(f"{tokens / 1e6:.3g}" for tokens in one.budgets_tokens)
        print(f"{one.name:22} {one.parameters:11,} {one.body_parameters:11,} {one.learning_rate:8.2g} "
              f"{one.global_batch_size * one.model.seq_length:13,}  {budgets}")  # fmt: skip
    print(f"{sum(one.flops for one in rungs):.3g} FLOPs without sweeps; written: {options.output}")
    return 0


def _check_output(path: Path, is_folder: bool = False) -> None:
    """Raise PointsError if the output cannot be written there, before any work is done for it."""
    wanted = "a folder" if is_folder else "a file"
    if path.exists() and path.is_dir() != is_folder:
        raise PointsError(f"--output {path}: is {'a folder' if path.is_dir() else 'a file'}; name {wanted} to write")
    folder = path if is_folder else path.parent
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PointsError(f"--output {path}: {there} is no folder that can be written to; name {wanted} elsewhere")


def _write_suite(path: Path, tree: dict[str, Any]) -> None:
    """Write a suite file. If the suite does not load, leave the file as it was and raise LadderError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_atomically(temporary, to_json(tree, indent=1) + "\n")
        try:
            load_suite(temporary)
        except SuiteError as error:
            raise LadderError(str(error).replace(str(temporary), str(path))) from None


def make_fit(options: argparse.Namespace) -> int:
    """Fit the laws, print them and write them if asked to."""

    from train.scaling import summary
    from train.scaling.fits import analyse_all, save_fits

    if options.output is not None:
        _check_output(options.output)
        if options.output.resolve() == options.source.resolve():
            raise PointsError(f"--output {options.output}: is the file that is read; name another")
    analyses, failures = analyse_all(_series(options), options.resamples, options.without_outliers)
    if not analyses:
        raise FitError("\n".join(failures))
    for one in analyses:
        print(f"{one.name}: {summary.series_text(one.series, _counted(options))}")
        if text := summary.outliers_text(one):
            print("", text, *summary.lines_of(summary.outlier_table(one)), sep="\n")
        print("", *summary.lines_of(summary.coefficient_table([one]), turned=True), "", sep="\n")
        for line in summary.doubts(one):
            print(f"warning: {one.name}: {line}")
    for line in failures:
        print(line)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save_fits(options.output, options.source, options.parameters, analyses)
        print(f"written: {options.output}")
    return 0


def make_report(options: argparse.Namespace) -> int:
    """Write the report."""
    from train.scaling.fits import analyse_all
    from train.scaling.report import write_report

    folder = options.output or options.source.parent / "report"
    _check_output(folder, is_folder=True)
    series = _series(options)
    analyses, failures = analyse_all(series, options.resamples, options.without_outliers)
    for file in write_report(folder, options.source, _counted(options), series, analyses, failures, options.note):
        print(file)
    if not analyses:
        raise FitError("\n".join(failures))
    return 0


def _counted(options: argparse.Namespace) -> str:
    """Return ' (total)' or ' (body)' for a suite; empty for a CSV file, which has its own count."""
    return f" ({options.parameters})" if options.source.suffix == ".json" else ""


def _series(options: argparse.Namespace) -> list["Series"]:
    from train.scaling.source import load_series

    columns = {}
    for item in options.columns:
        key, equals, column = item.partition("=")
        if not equals or key not in ("N", "D", "C", "loss", "architecture"):
            raise PointsError(f"--columns {item!r}: expected N=, D=, C=, loss= or architecture= and a column's name")
        columns[key] = column
    return load_series(options.source, options.parameters, columns, options.least_ratio, options.overrides)


def make_prediction(options: argparse.Namespace) -> int:
    """Print the predicted loss of a size and length, or the best ones for a compute budget."""

    from train.scaling.analysis import SEARCHED, compute_optimal
    from train.scaling.fits import read_fits
    from train.scaling.law import interval

    given = [key for key in ("flops", "parameters", "tokens") if getattr(options, key) is not None]
    if given not in (["flops"], ["parameters", "tokens"]):
        raise PointsError("say either --flops alone, or both --parameters and --tokens")
    for name, (law, resamples, row) in read_fits(options.fits).items():
        note = ""
        if options.flops is not None:
            best = compute_optimal(law, options.flops)
            parameters, tokens = float(best.parameters[0]), float(best.tokens[0])
            if not 1.05 * SEARCHED[0] < parameters < SEARCHED[1] / 1.05:
                note = f" (no optimum among the {SEARCHED[0]:g} to {SEARCHED[1]:g} parameters searched)"
        else:
            parameters, tokens = options.parameters, options.tokens
        low, high = interval([float(other.loss(parameters, tokens)) for other in resamples])
        for value, key in ((parameters, "range_parameters"), (tokens, "range_tokens")):
            if not row[key][0] <= value <= row[key][1]:
                note = note or " (extrapolated)"
        loss = float(law.loss(parameters, tokens))
        unit = row.get("loss_unit", NATS)  # files of earlier versions have none
        print(f"{name}: {loss:.4f} ({unit}) [{low:.4f}, {high:.4f}] at {parameters:.3g} "
              f"parameters and {tokens:.3g} tokens{note}")  # fmt: skip
    return 0


COMMANDS = {"plan": make_plan, "fit": make_fit, "report": make_report, "predict": make_prediction}


if __name__ == "__main__":
    run_command(main)
