"""List every row of the tables and figures of arXiv 2501.03489, and write it as a configuration.

    python -m train.paper list                                  every row with its published perplexity
    python -m train.paper write --output configs/rows           a configuration file for each row
    python train/main.py --config configs/rows/codeparrot-12L-T128.EReg.json

`SETTINGS` defines how a group of rows was trained, `ROWS` the model of each row. Rows marked AERO are from the
companion paper, arXiv 2410.13060. Rows marked "missing" are in neither paper; they separate ingredients that the paper
varies together. Values that the papers do not state are marked [choice].

Temperatures are raw, as published, and can cross zero. `write --temperature-form exp` writes rows whose temperatures
stay positive; these train in folders of their own.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.command_line import path_argument, print_warning, run_command
from data.files.strict_json import to_json
from train.config import Config, config_from_dict
from train.config.schedule import raw_temperatures

CODEPARROT_TOKENS = 16_700_000 * 128  # the paper's 16.7 million examples of 128 tokens
CODEPARROT_PENALTY = 1e-5 * 128 * 128  # lambda * micro-batch * T of the published sum, as a weight of a mean
LANGUINI_PENALTY = 5 * CODEPARROT_PENALTY  # lambda is 5 times as large; the micro-batch is not published [choice]

Tree = dict[str, dict[str, Any]]


def _codeparrot(num_layers: int, seq_length: int, **model: Any) -> Tree:
    sizes = {"num_layers": num_layers, "hidden_size": 768, "num_attention_heads": 12, "seq_length": seq_length}
    return {
        "model": {**sizes, "temperature_init": 1e-2, "temperature_form": "raw", "initialization": "paper", **model},
        "regularizer": {"coefficient": CODEPARROT_PENALTY, "margin": 0.20, "granularity": "per_query"},
        "data": {"path": "datasets/codeparrot", "planned_vocab_size": 50_000},
        "optimizer": {
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_fraction": 0.05,
            "weight_decay": 0.1,
            "beta2": 0.999,
        },
        "training": {"micro_batch_size": 128, "global_batch_size": 512, "train_tokens": CODEPARROT_TOKENS},
        "checkpoint": {"interval": 2000},
        "logging": {"interval": 50, "image_interval": 500},
    }


def _languini(train_tokens: float, global_batch_size: int) -> Tree:
    sizes = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 512}
    return {
        "model": {**sizes, "temperature_init": 1e-1, "temperature_form": "raw", "initialization": "paper"},
        "regularizer": {"coefficient": LANGUINI_PENALTY, "margin": 0.20, "granularity": "per_query"},
        "data": {"path": "datasets/languini", "planned_vocab_size": 16_384},
        "optimizer": {
            "learning_rate": 6e-4,
            "min_learning_rate": 6e-6,
            "schedule": "cosine",
            "warmup_steps": 200,
            "weight_decay": 0.0,
            "beta2": 0.95,
        },
        "training": {
            "micro_batch_size": 32,
            "global_batch_size": global_batch_size,
            "train_tokens": int(train_tokens),
        },
        "checkpoint": {"interval": 2000},
        "logging": {"interval": 50, "image_interval": 500},
    }


PYTHIA_70M = {"hidden_size": 512, "num_attention_heads": 8, "positions": "rotary", "tied_head": False}

SETTINGS: dict[str, Tree] = {
    "codeparrot-12L-T128": _codeparrot(12, 128),
    "codeparrot-12L-T256": _codeparrot(12, 256),
    "codeparrot-18L-T128": _codeparrot(18, 128),
    "languini-12L-T512-1.2B": _languini(1.2e9, 128),
    "languini-12L-T512-2.4B": _languini(2.4e9, 128),
    "languini-12L-T512-4.8B": _languini(4.8e9, 256),
    "pythia70m-6L-T128": _codeparrot(6, 128, **PYTHIA_70M),
    "pythia70m-6L-T256": _codeparrot(6, 256, **PYTHIA_70M),
}


@dataclass(frozen=True)
class Row:
    """A trained model of the paper.

    Attributes:
        setting: key of SETTINGS.
        label: what the tables call it, unique within the setting.
        architecture: name in model.config.ARCHITECTURES.
        places: tables and figures that show it, "AERO" or "missing".
        perplexity: published validation perplexity; None where none was published.
        diverges: the paper reports NaN.
        changes: sections of the configuration that differ from the setting's.
    """

    setting: str
    label: str
    architecture: str
    places: tuple[str, ...]
    perplexity: float | None = None
    diverges: bool = False
    changes: Tree = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return a unique name without characters that a shell would interpret."""
        return f"{self.setting}.{self.label}".replace("(", "-").replace(")", "")

    def tree(self) -> dict[str, Any]:
        """Return the configuration's sections that this row sets."""
        tree: dict[str, Any] = {key: dict(section) for key, section in SETTINGS[self.setting].items()}
        tree["model"]["architecture"] = self.architecture
        for key, section in self.changes.items():
            tree[key] = {**tree.get(key, {}), **section}
        return {"run_dir": f"runs/paper/{self.name}", **tree}

    def config(self) -> Config:
        return config_from_dict(self.tree())

    @property
    def has_raw_temperatures(self) -> bool:
        """Whether the row trains temperatures that can cross zero."""
        return raw_temperatures(self.config()) is not None

    def with_positive_temperatures(self) -> dict[str, Any]:
        """Return the sections of the same row with exponential temperatures, in another run_dir."""
        tree = self.tree()
        return {**tree, "run_dir": f"runs/paper-exp/{self.name}", "model": {**tree["model"], "temperature_form": "exp"}}


EREG = "EReg(SM(t)+ScFuFFN)"
SHORT_NAMES = {"SM+LN+G": "SM+LN+G", "SM+LN+R": "SM+LN+R", "SM+ScFuFFN": "SM+ScFuFFN", EREG: "EReg"}


def _main_four(setting: str, places: tuple[str, ...], perplexities: tuple[float, ...]) -> Iterator[Row]:
    """Yield the four architectures that every result table of the paper has."""
    for (architecture, label), perplexity in zip(SHORT_NAMES.items(), perplexities, strict=True):
        yield Row(setting, label, architecture, places, perplexity)


def _reduced(setting: str, places: tuple[str, ...], perplexities: dict[str, float | None]) -> Iterator[Row]:
    for architecture, perplexity in perplexities.items():
        yield Row(setting, architecture, architecture, places, perplexity, diverges=perplexity is None)


def _normalized(placement: str, weight: float, spectral: float, places: tuple[str, ...]) -> Iterator[Row]:
    for kind, key, perplexity in (("WN", "weight_norm", weight), ("SN", "spectral_norm", spectral)):
        changes = {"model": {key: placement}}
        name = f"SM+{kind}"
        yield Row(SMALL, f"{name}({placement})", name, places, perplexity, changes=changes)


SMALL = "codeparrot-12L-T128"
TABLE_5_PERPLEXITIES = {
    "QK": (3.89, 4.25),
    "FFN": (3.64, 3.63),
    "QK+FFN": (3.88, 4.23),
    "QKV+FFN": (3.93, 4.26),
    "QKVO+FFN": (3.98, 4.34),
}
MARGINS = (0.0, 0.05, 0.10, 0.15, 0.25, 0.30)  # 0.20 is the EReg row itself
HEAD_PICTURES = ("Table 2", "Figure 2", "Figure 3")


def _rows() -> Iterator[Row]:
    main = ("Table 3", *HEAD_PICTURES, "Figure 5")
    yield Row(SMALL, "SM+LN+G", "SM+LN+G", main, 2.69)
    yield Row(SMALL, "SM+LN+R", "SM+LN+R", ("Table 3", *HEAD_PICTURES), 2.76)
    yield from _reduced(SMALL, HEAD_PICTURES, {"SM+LN": 3.38, "SM+G": 3.20, "SM+R": 2.94})
    yield Row(SMALL, "SM", "SM", (*HEAD_PICTURES, "Figure 5"), diverges=True)
    yield Row(SMALL, "SM+ScFFN", "SM+ScFFN", ("Table 6", "Figure 5"), 3.478)
    yield Row(SMALL, "SM+ScFuFFN", "SM+ScFuFFN", ("Table 3",), 3.48)
    yield Row(SMALL, "EReg", EREG, ("Table 3", "Figure 5", "Figure 6", "Figure 7", "Figure 8"), 3.21)
    for placement, published in TABLE_5_PERPLEXITIES.items():
        also = ("Table 6", "Figure 5") if placement == "FFN" else ()
        yield from _normalized(placement, *published, ("Table 5", *also))
    for margin in MARGINS:
        changes = {"regularizer": {"margin": margin}}
        yield Row(SMALL, f"EReg-margin{margin:.2f}", EREG, ("Figure 7", "Figure 8"), changes=changes)
    yield from _main_four("codeparrot-12L-T256", ("Table 7",), (2.35, 2.41, 3.03, 2.92))
    yield from _main_four("codeparrot-18L-T128", ("Table 8",), (2.56, 2.63, 3.24, 3.13))
    yield from _main_four("languini-12L-T512-1.2B", ("Table 4",), (25.71, 26.06, 33.77, 31.54))
    yield from _main_four("languini-12L-T512-2.4B", ("Table 4",), (23.32, 23.55, 30.82, 28.70))
    yield from _main_four("languini-12L-T512-4.8B", ("Table 4",), (21.29, 21.58, 28.59, 26.55))
    pythia = ("SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R")
    for length, perplexities in (
        (128, (3.512, 3.590, 4.445, 4.086, 3.736)),
        (256, (3.054, 3.107, 3.836, 3.570, 3.273)),
    ):
        yield from _reduced(f"pythia70m-6L-T{length}", ("AERO",), dict(zip(pythia, perplexities, strict=True)))
    yield from _ablations()


def _ablations() -> Iterator[Row]:
    """Yield rows that separate what the paper varies together: temperature, regularizer, their forms."""
    missing = ("missing",)
    yield Row(SMALL, "SM(t)+ScFuFFN", "SM(t)+ScFuFFN", missing)
    for label, changes in {
        "EReg-no-temperature": {"model": {"temperature": "none"}},
        "EReg-temperature-exp": {"model": {"temperature_form": "exp"}},
        "EReg-temperature-per-head": {"model": {"temperature": "per_head"}},
        "EReg-per-head": {"regularizer": {"granularity": "per_head"}},
        "EReg-exp-per-head": {"model": {"temperature_form": "exp"}, "regularizer": {"granularity": "per_head"}},
    }.items():
        yield Row(SMALL, label, EREG, missing, changes=changes)


ROWS: dict[str, Row] = {row.name: row for row in _rows()}


def rows_at(place: str) -> list[Row]:
    """Return the rows of a table or figure, every row for "all", or the one row of that name; else an empty list."""
    if place == "all":
        return list(ROWS.values())
    return [ROWS[place]] if place in ROWS else [row for row in ROWS.values() if place in row.places]


def places() -> list[str]:
    """Return every table and figure of the paper that a row stands in."""
    return sorted({place for row in ROWS.values() for place in row.places})


@dataclass(frozen=True)
class Measurement:
    """A published measurement of private inference (two parties, 32 cores each, SecretFlow), and its printed FLOPs.

    Attributes:
        communication_gb, latency_min: as printed.
        ffn_gflops, attention_gflops: as printed, one decimal.
        source: the table.
    """

    setting: str
    architecture: str
    communication_gb: float
    latency_min: float
    ffn_gflops: str
    attention_gflops: str
    source: str

    def config(self) -> Config:
        return Row(self.setting, self.architecture, self.architecture, ()).config()


def _measured(
    setting: str, source: str, gflops: tuple[str, str, str], costs: dict[str, tuple[float, float]]
) -> Iterator[Measurement]:
    ffn, fused_ffn, attention = gflops
    for architecture, (gigabytes, minutes) in costs.items():
        printed_ffn = fused_ffn if "ScFuFFN" in architecture else ffn
        table = "arXiv 2410.13060" if architecture == "SM+ScFFN" else source
        yield Measurement(setting, architecture, gigabytes, minutes, printed_ffn, attention, table)


# EReg costs what SM+ScFuFFN costs: temperatures and thresholds vanish at inference.
MEASUREMENTS: list[Measurement] = [
    *_measured(
        "codeparrot-12L-T128",
        "Table 3",
        ("14.5", "1.8", "7.7"),
        {"SM+LN+G": (25.32, 8.21), "SM+LN+R": (9.44, 6.06), "SM+ScFuFFN": (6.43, 4.76), "SM+ScFFN": (6.95, 5.68)},
    ),
    *_measured(
        "codeparrot-12L-T256",
        "Table 7",
        ("29.0", "3.6", "16.3"),
        {"SM+LN+G": (58.51, 16.57), "SM+LN+R": (26.73, 12.59),
         "SM+ScFuFFN": (20.72, 10.45), "SM+ScFFN": (21.77, 11.91)},
    ),
    *_measured(
        "codeparrot-18L-T128",
        "Table 8",
        ("21.7", "2.7", "11.6"),
        {"SM+LN+G": (37.17, 10.77), "SM+LN+R": (13.34, 8.04), "SM+ScFuFFN": (8.83, 6.07), "SM+ScFFN": (9.62, 7.23)},
    ),
    *_measured(
        "languini-12L-T512-4.8B",
        "Table 4",
        ("58.0", "7.3", "36.2"),
        {"SM+LN+G": (145.24, 30.74), "SM+LN+R": (81.71, 23.54),
         "SM+ScFuFFN": (69.68, 19.44), "SM+ScFFN": (71.76, 21.51)},
    ),

]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="print every row with its published perplexity")
    writing = commands.add_parser("write", help="write a configuration file for each row")
    for command in (listing, writing):
        command.add_argument(
            "--only", metavar="PLACE", help=f"only these rows: {', '.join(places())}; or the name of one row"
        )
    writing.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder to write to")
    writing.add_argument(
        "--temperature-form",
        choices=["published", "exp"],
        default="published",
        help="'exp' keeps the temperatures of rows positive that are published raw (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    rows = list(ROWS.values()) if options.only is None else rows_at(options.only)
    if not rows:
        print(f"error: --only {options.only!r}: no such table, figure or row; see --help", file=sys.stderr)
        return 2
    if options.command == "list":
        for row in rows:
            published = "NaN" if row.diverges else row.perplexity if row.perplexity is not None else "-"
            print(f"{row.name:52} {published!s:>6}  {', '.join(row.places)}")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    raw = [row for row in rows if row.has_raw_temperatures]
    for row in rows:
        becomes_exp = row in raw and options.temperature_form == "exp"
        tree = row.with_positive_temperatures() if becomes_exp else row.tree()
        (options.output / f"{row.name}.json").write_text(to_json(tree, indent=2) + "\n")
    print(f"{len(rows)} configurations in {options.output}")
    if raw and options.temperature_form == "published":
        print_warning(
            f"{len(raw)} of them train raw temperatures, as published; these can cross zero, where logits grow without "
            "bound and change sign. --temperature-form exp keeps them positive"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
