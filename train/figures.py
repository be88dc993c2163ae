"""Draw every picture that a run has the data for, or compare several runs:

    python -m train.figures --run runs/first
    python -m train.figures --run runs/ereg runs/baseline --output comparison

One run gives the head map, layer entropies, head shares, thresholds, learned scales and losses. They go to its figures/
folder. Several runs give their validation losses in one picture and their head maps side by side. A run may be drawn
while it trains.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import path_argument, print_warning, run_command
from train.pictures.files import write_picture
from train.pictures.run import Array, FigureError, Run, as_array, load_run
from train.run.names import FIGURES
from train.run.reader import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.figures", description="Draw the pictures of a run, or compare runs."
    )
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        action="extend",
        type=path_argument,
        metavar="DIR",
        help="folder of a run; several runs are compared",
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="where to write (default: figures/ of the first run)"
    )
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="file type (default: png)")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(folder) for folder in options.run]
        output = options.output or options.run[0] / FIGURES
        for file in save(figures_of(runs), output, options.format):
            print(file)
    except FigureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def figures_of(runs: list[Run]) -> Iterator[tuple[str, "Figure"]]:
    """Yield name and figure of each picture that the runs have the data for."""
    return run_figures(runs[0]) if len(runs) == 1 else comparison_figures(runs)


def run_figures(run: Run) -> Iterator[tuple[str, "Figure"]]:
    """Yield name and figure of every picture of one run."""
    from train.pictures import maps, plots

    newest = run.newest_heads()
    if newest is not None:
        entropy_nats, moment = newest
        yield "head_map", maps.head_map_figure(entropy_nats, run.seq_length, f"{run.title}\n{moment}")
    if run.training_rows:
        train = {key: as_array([row[key] for row in run.training_rows]) for key in ("step", "ce_loss", "entropy_loss")}
        yield "loss", plots.loss_figure(train, run.validation_curve("step"), run.title)
    if not run.head_rows:
        return
    steps, entropy_SLN = run.head_history()
    yield "layer_entropy", plots.layer_entropy_figure(steps, entropy_SLN, run.seq_length, run.title)
    yield "head_shares", plots.shares_figure(steps, entropy_SLN, run.seq_length, run.title)
    last = run.head_rows[-1]
    if last.get("threshold") is not None:
        title = f"{run.title}, step {last['step']:,}"
        yield "threshold_map", maps.threshold_map_figure(as_array(last["threshold"]), title)
    panels, ranges = learned_scales(run.head_rows)
    if panels:
        yield "learned_scales", plots.scales_figure(steps, panels, ranges, run.title)


def comparison_figures(runs: list[Run]) -> Iterator[tuple[str, "Figure"]]:
    """Yield name and figure of the pictures that hold several runs; warn if their datasets differ."""
    from train.pictures import maps, plots

    names = distinct_names(runs)
    fingerprints = {run.fingerprint for run in runs}
    if len({(run.data_path, run.vocab_size) for run in runs} if None in fingerprints else fingerprints) > 1:
        datasets = "; ".join(f"{run.folder}: {run.data_path}, vocabulary {run.vocab_size}" for run in runs)
        print_warning(f"losses a token do not compare, since the runs' datasets differ ({datasets})")
        names = [f"{name} on {Path(run.data_path).name}" for name, run in zip(names, runs, strict=True)]
    curves = {name: run.validation_curve("tokens") for name, run in zip(names, runs, strict=True)}
    found = {name: curve for name, curve in curves.items() if curve is not None}
    if found:
        yield "validation_loss", plots.validation_figure(found)
    newest = [(name, run, heads) for name, run in zip(names, runs, strict=True) if (heads := run.newest_heads())]
    if newest:
        titled = {f"{name}\n{moment}": entropy_nats for name, _, (entropy_nats, moment) in newest}
        yield "head_maps", maps.head_maps_figure(titled, [run.seq_length for _, run, _ in newest])


def learned_scales(rows: list[Row]) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """Collect the learned scalars that a run has.

    Args:
        rows: of entropies, one a logging step; not empty.

    Returns:
        Values [S, L] by panel title; and by the same titles the least and greatest value [S] over all heads and
        positions, where a panel shows means.
    """
    panels: dict[str, Array] = {}
    ranges: dict[str, tuple[Array, Array]] = {}
    if rows[-1].get("temperature") is not None:
        label = "temperature t (mean a layer;\ngrey: range over all heads and positions)"
        panels[label] = as_array([row["temperature"] for row in rows]).mean(axis=2)
        least, greatest = (as_array([row[f"temperature_{end}"] for row in rows]) for end in ("min", "max"))
        ranges[label] = least.min(axis=1), greatest.max(axis=1)
    for key, label in (
        ("alpha", r"$\alpha$: the FFN is divided by it"),
        ("beta", r"$\beta$: the residual is multiplied by it"),
    ):
        if rows[-1].get(key) is not None:
            panels[label] = as_array([row[key] for row in rows])
    return panels, ranges


def distinct_names(runs: list[Run]) -> list[str]:
    """Name each run by its folder, or by its whole path if another has the same name."""
    titles = [run.title for run in runs]
    return [
        title if titles.count(title) == 1 else f"{run.folder}: {run.model['architecture']}"
        for title, run in zip(titles, runs, strict=True)
    ]


def save(figures: Iterator[tuple[str, "Figure"]], output: Path, file_format: str) -> Iterator[Path]:
    """Write each figure and yield its file.

    Raises:
        FigureError: there is nothing to draw, or a file cannot be written.
    """
    is_empty = True
    for stem, figure in figures:
        file = output / f"{stem}.{file_format}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_picture(figure, file, dpi=150)
        except OSError as error:
            raise FigureError(f"{file}: cannot be written ({error.strerror}); choose another --output") from None
        is_empty = False
        yield file
    if is_empty:
        raise FigureError("nothing to draw: no run has reached its first logging step or evaluation; wait for one")


if __name__ == "__main__":
    run_command(main)
