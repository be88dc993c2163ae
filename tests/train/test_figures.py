"""The pictures hold the data they were given, the command reads what a run writes, and refuses what it cannot read."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.figures import comparison_figures, main, run_figures
from train.pictures.maps import head_map_figure, head_maps_figure, threshold_map_figure
from train.pictures.plots import layer_entropy_figure, scales_figure, shares_figure
from train.pictures.run import load_run
from train.run.entropy_words import ceiling_nats, class_shares

LAYERS, HEADS, SEQ_LENGTH = 3, 4, 128


def write_run(folder: Path, architecture: str = "EReg(SM(t)+ScFuFFN)", steps: int = 6, learned: bool = True) -> Path:
    """A run directory whose numbers are simple functions of step, layer and head."""
    folder.mkdir(parents=True)
    model = {
        "architecture": architecture,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "seq_length": SEQ_LENGTH,
    }
    (folder / "config.json").write_text(json.dumps({"config": {"model": model}, "versions": {}, "git_commit": None}))
    metrics, entropies = [], []
    for step in range(1, steps + 1):
        ce_loss = 5 - step / 10
        metrics.append({"step": step, "tokens": 64 * step, "ce_loss": ce_loss, "entropy_loss": 0.1 / step})
        if step % 3 == 0:
            metrics.append({"step": step, "tokens": 64 * step, "validation_loss": ce_loss + 0.1})
            entropies.append(head_row(step, learned))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "entropy.jsonl", entropies)
    return folder


def head_row(step: int, learned: bool) -> dict[str, Any]:
    per_head = [[0.1 * step + 0.5 * layer + 0.1 * head for head in range(HEADS)] for layer in range(LAYERS)]
    per_layer = [1 + 0.1 * layer for layer in range(LAYERS)]
    row: dict[str, Any] = {"step": step, "tokens": 64 * step, "entropy_nats": per_head}
    row["threshold"] = [[value / 10 for value in layer] for layer in per_head] if learned else None
    row["temperature"] = per_head if learned else None
    for key in ("temperature_min", "temperature_max", "alpha", "beta"):
        row[key] = per_layer if learned else None
    return row


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("entropies", "counts"),
    [
        # ln(128!)/128 = 3.878: collapsed below 0.1939, halved at 1.939, overloaded above 3.8004
        ([[0.0, 0.19, 0.20, 1.93], [1.95, 3.79, 3.81, 3.878]], [2, 2, 2, 2]),
        ([[2.7, 2.7], [2.7, 2.7]], [0, 0, 4, 0]),  # by the paper's definition all four are overloaded
        ([[math.nan, 4.0], [0.1, math.inf]], [1, 0, 0, 1]),
    ],
)
def test_heads_are_classified_as_counted_by_hand(entropies: Any, counts: list[int]) -> None:
    np.testing.assert_allclose(class_shares(entropies, 128), np.array(counts) / sum(counts), atol=1e-12)


def test_the_same_limits_at_another_length() -> None:
    heads = [[0.22, 0.24, 4.4, 4.5]]  # ln(256!)/256 = 4.560: 0.2280 and 4.4688
    assert class_shares(heads, 256) == [0.25, 0.25, 0.25, 0.25]
    assert class_shares([[0.0]], 1) == [0, 0, 1, 0], "one token leaves nothing to choose, which is no failure"


def test_shares_without_any_finite_head_are_unknown() -> None:
    assert np.isnan(class_shares([[math.nan, math.inf]], 128)).all()


@pytest.mark.parametrize("seq_length", [1, 2, 128, 512])
def test_the_ceiling_is_the_mean_of_ln_i(seq_length: int) -> None:
    expected = sum(math.log(i) for i in range(1, seq_length + 1)) / seq_length
    assert ceiling_nats(seq_length) == pytest.approx(expected, rel=1e-12)


def test_head_map_shows_the_given_entropies_under_the_ceiling() -> None:
    entropy_LN = np.linspace(0, 3.8, 12).reshape(3, 4)
    entropy_LN[1, 2] = math.nan
    axes = head_map_figure(entropy_LN, SEQ_LENGTH, "title").axes[0]
    image = axes.get_images()[0]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), math.nan), entropy_LN)
    assert image.get_clim() == (0.0, pytest.approx(3.878, abs=5e-4))
    notes = {note.get_position(): note.get_text() for note in axes.texts}
    assert notes[(3, 2)] == "3.80" and notes[(1, 0)] == "0.35" and notes[(2, 1)] == "NaN" and len(notes) == 12
    assert axes.get_title() == "title"
    assert axes.get_ylim() == (2.5, -0.5), "layer 0 is on top"


@pytest.mark.parametrize("shape", [(2, 4), (12, 12), (28, 20), (48, 64), (96, 128)])
def test_annotations_stay_inside_their_cells(shape: tuple[int, int]) -> None:
    figure = head_map_figure(np.full(shape, 2.345), SEQ_LENGTH)
    figure.canvas.draw()
    axes = figure.axes[0]
    cell_width = axes.get_window_extent().width / shape[1]
    cell_height = axes.get_window_extent().height / shape[0]
    assert bool(axes.texts) == (shape != (96, 128)), "numbers that nobody could read are left out"
    for note in axes.texts[:1]:
        box = note.get_window_extent()
        assert box.width < cell_width and box.height < cell_height


def test_maps_side_by_side_share_the_largest_ceiling() -> None:
    maps = {"a": np.full((2, 2), 1.0), "b": np.full((3, 5), 2.0)}
    first, second = head_maps_figure(maps, [128, 512]).axes[:2]
    assert first.get_images()[0].get_clim() == second.get_images()[0].get_clim()
    assert first.get_images()[0].get_clim()[1] == pytest.approx(5.246, abs=5e-4)


def test_threshold_map_has_each_layers_mean_and_variance_beside_it() -> None:
    axes = threshold_map_figure([[0.2, 0.4], [0.5, 0.5]]).axes
    np.testing.assert_array_equal(axes[0].get_images()[0].get_array(), [[0.2, 0.4], [0.5, 0.5]])
    np.testing.assert_allclose(axes[1].lines[0].get_xdata(), [0.3, 0.5])
    np.testing.assert_allclose([bar.get_width() for bar in axes[2].patches], [0.01, 0.0], atol=1e-15)


def test_layer_lines_are_the_means_over_heads() -> None:
    entropy_SLN = np.arange(12.0).reshape(3, 2, 2)
    ceiling, *layers = layer_entropy_figure([10, 20, 30], entropy_SLN, SEQ_LENGTH).axes[0].lines
    assert ceiling.get_ydata()[0] == pytest.approx(3.878, abs=5e-4)
    np.testing.assert_array_equal([line.get_ydata() for line in layers], [[0.5, 4.5, 8.5], [2.5, 6.5, 10.5]])
    np.testing.assert_array_equal(layers[0].get_xdata(), [10, 20, 30])


def test_shares_name_the_healthy_part_of_the_last_step() -> None:
    entropy_SLN = [[[3.85, 3.85, 3.85, 3.85]], [[3.85, 2.5, 1.5, 0.1]]]
    _, last = shares_figure([1, 2], entropy_SLN, SEQ_LENGTH).axes
    assert [note.get_text() for note in last.texts] == ["25.0%"] * 4
    assert last.get_title() == "last step: 50% healthy"
    assert last.get_ylabel() == "mean entropy of a head,\nof ln(T!)/T = 3.88 nats"


def test_scales_use_a_logarithmic_axis_only_where_all_values_are_positive() -> None:
    wide = {"positive": np.array([[0.01, 1.0]]), "signed": np.array([[-0.01, 1.0]])}
    axes = scales_figure([1], wide, {}).axes
    assert [one.get_yscale() for one in axes[:2]] == ["log", "linear"]


def test_command_draws_every_picture_of_a_regularized_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["--run", str(run)]) == 0
    stems = ["head_map", "loss", "layer_entropy", "head_shares", "threshold_map", "learned_scales"]
    files = [run / "figures" / f"{stem}.png" for stem in stems]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_run_without_learned_scalars_gives_no_pictures_of_them(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", "SM+LN+G", learned=False))
    assert [stem for stem, _ in run_figures(run)] == ["head_map", "loss", "layer_entropy", "head_shares"]


def test_loss_picture_holds_the_rows_of_the_run(tmp_path: Path) -> None:
    top, bottom = dict(run_figures(load_run(write_run(tmp_path / "run"))))["loss"].axes
    np.testing.assert_allclose(top.lines[0].get_xydata(), [[step, 5 - step / 10] for step in range(1, 7)])
    np.testing.assert_allclose(top.lines[1].get_xydata(), [[3, 4.8], [6, 4.5]])
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), [0.1 / step for step in range(1, 7)])


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ereg, baseline = write_run(tmp_path / "ereg"), write_run(tmp_path / "baseline", "SM+LN+G", learned=False)
    output = tmp_path / "compared"
    assert main(["--run", str(ereg), "--run", str(baseline), "--output", str(output), "--format", "svg"]) == 0
    assert capsys.readouterr().out.split() == [str(output / "validation_loss.svg"), str(output / "head_maps.svg")]


def test_losses_on_different_datasets_are_not_compared_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run, vocab_size in zip(runs, (400, 500), strict=True):
        config = json.loads((run / "config.json").read_text())
        config["config"]["data"] = {"path": f"datasets/of_{vocab_size}"}
        (run / "config.json").write_text(json.dumps({"vocab_size": vocab_size, **config}))
    figures = dict(comparison_figures([load_run(run) for run in runs]))
    labels = [line.get_label() for line in figures["validation_loss"].axes[0].lines]
    assert "on of_400" in labels[0] and "on of_500" in labels[1]
    assert capsys.readouterr().err.startswith("warning: losses a token do not compare")
    assert list(comparison_figures([load_run(runs[0])] * 2)) and capsys.readouterr().err == ""
    for run in runs:  # of one dataset after all, which was moved in between
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "dataset": {"fingerprint": "97579c15"}}))
    assert list(comparison_figures([load_run(run) for run in runs])) and capsys.readouterr().err == ""


@pytest.mark.parametrize(("step", "expected"), [(6, "validation, step 6"), (3, "step 6")])
def test_the_evaluation_is_shown_unless_training_went_on(tmp_path: Path, step: int, expected: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(json.dumps(head_row(step, learned=True)))
    newest = load_run(folder).newest_heads()
    assert newest is not None and newest[1] == expected


def test_a_row_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    assert len(load_run(folder).training_rows) == 6


def test_values_that_were_not_finite_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = head_row(9, learned=True)
    row["entropy_nats"][1] = [None] * HEADS
    with (folder / "entropy.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "tokens": 448, "ce_loss": None, "entropy_loss": None}) + "\n")
    assert main(["--run", str(folder)]) == 0


@pytest.mark.filterwarnings("error")
def test_a_run_of_nothing_but_nan_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "entropy.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        write_lines(folder / name, [{key: undefined(key, value) for key, value in row.items()} for row in rows])
    assert main(["--run", str(folder)]) == 0


def undefined(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [undefined(key, item) for item in value]
    return value if key in ("step", "tokens") else None


def break_middle_line(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(
        "".join(["{broken\n" if number == 1 else line for number, line in enumerate(lines)])
    )


def break_shape(folder: Path) -> None:
    row = head_row(9, learned=True)
    row["entropy_nats"] = row["entropy_nats"][:-1]
    write_lines(folder / "entropy.jsonl", [row])


def break_number(folder: Path) -> None:
    row = {"step": 1, "tokens": 64, "ce_loss": "five", "entropy_loss": 0.1}
    write_lines(folder / "metrics.jsonl", [row])


def change(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """A damage: another value in the first row of a file."""

    def damage(folder: Path) -> None:
        lines = (
            (folder / name).read_text().splitlines() if (folder / name).exists() else [json.dumps(head_row(6, True))]
        )
        first = {**json.loads(lines[0]), key: value}
        (folder / name).write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")

    return damage


def change_size(value: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace(f'"seq_length": {SEQ_LENGTH}', f'"seq_length": {value}'))

    return damage


def remove_rows(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    (folder / "entropy.jsonl").write_text("")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda folder: (folder / "config.json").write_text('{"config": {}}'), ["config.json", "model"]),
        (lambda folder: (folder / "metrics.jsonl").unlink(), ["metrics.jsonl", "missing"]),
        (lambda folder: (folder / "entropy.jsonl").write_bytes(b"\xff\xfe\n"), ["entropy.jsonl", "UTF-8"]),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), ["evaluation.json", "list"]),
        (lambda folder: (folder / "evaluation.json").write_text("{}"), ["evaluation.json", "entropy_nats"]),
        (break_middle_line, ["metrics.jsonl", "line 2", "{broken"]),
        (break_shape, ["entropy.jsonl", "step 9", "(2, 4)", "[3, 4]"]),
        (break_number, ["metrics.jsonl", "line 1", "numbers", "remove"]),
        (change("metrics.jsonl", "step", "one"), ["metrics.jsonl", "line 1", "numbers"]),
        (change("metrics.jsonl", "tokens", 10**400), ["metrics.jsonl", "line 1", "numbers"]),
        (change("entropy.jsonl", "step", [1]), ["entropy.jsonl", "line 1", "numbers"]),
        (change("entropy.jsonl", "temperature", None), ["entropy.jsonl", "step 3", "lacks temperature"]),
        (change("entropy.jsonl", "temperature_min", None), ["entropy.jsonl", "step 3", "lacks temperature_min"]),
        (change("entropy.jsonl", "threshold", [[1e99] * HEADS] * LAYERS), ["entropy.jsonl", "step 3", "too large"]),
        (change("evaluation.json", "step", "six"), ["evaluation.json", "step", "numbers"]),
        (change("evaluation.json", "entropy_nats", None), ["evaluation.json", "entropy_nats"]),
        (change("evaluation.json", "temperature", "x"), ["evaluation.json", "temperature is no array"]),
        (change_size("0"), ["config.json", "seq_length"]),
        (change_size("1e400"), ["config.json", "1e400 is too large"]),
        (change_size('"128"'), ["config.json", "seq_length"]),
        (remove_rows, ["nothing to draw"]),
        (lambda folder: (folder / "figures").write_text("a file in the way"), ["figures", "--output"]),
    ],
)
def test_a_damaged_run_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: list[str]
) -> None:
    folder = write_run(tmp_path / "run")
    damage(folder)
    assert main(["--run", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message
    assert not list(folder.glob("figures/*")), "nothing is drawn before all is read"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_drawing_leaves_pyplot_alone_and_reading_needs_no_matplotlib() -> None:
    script = (
        "import sys; import train.figures; assert 'matplotlib' not in sys.modules; "
        "from train.pictures.maps import head_map_figure; head_map_figure([[1.0]], 8).canvas.draw(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
