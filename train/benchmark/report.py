"""Describes the machine, and writes tables and pictures of benchmarks."""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.command_line import path_argument
from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.config import ConfigError
from train.run.provenance import git_commit


def machine() -> dict[str, str]:
    """Return device, versions, date, commit and command."""
    has_gpu = torch.cuda.is_available()
    described = {
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit() or "unknown",
        "command": "python -m train.benchmark " + " ".join(sys.argv[1:]),
    }
    if has_gpu:
        import triton

        described["triton"] = triton.__version__
    return described


def add_arguments(parser: argparse.ArgumentParser, folder: str, example: str) -> None:
    """Add what benchmarks of a configuration share: the configuration, its overrides, and the output folder.

    Args:
        folder: where results go by default.
        example: a shipped configuration.
    """
    parser.add_argument("--config", required=True, metavar="FILE", help=f"JSON configuration, for instance {example}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    parser.add_argument(
        "--output", type=path_argument, default=Path(folder), metavar="DIR", help="default: %(default)s"
    )


def make_folder(folder: Path) -> None:
    """Create the output folder. Raise ConfigError if it cannot be written, before anything is timed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError([f"--output {folder}: cannot be written ({error.strerror}); choose another folder"]) from None


def draw_bars(labels: list[str], values: list[float], unit: str, file: Path, notes: list[str] | None = None) -> None:
    """Draw a horizontal bar for each label; notes are written at the bars' ends in place of the values."""
    from train.pictures.files import write_picture
    from train.pictures.style import PALETTE, new_figure, tidy

    figure = new_figure(8, 0.4 * len(values) + 1.2)
    axes = figure.subplots()
    tidy(axes)
    bars = axes.barh(range(len(values)), values, color=PALETTE[0])
    axes.bar_label(bars, labels=notes or [f"{value:.4g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    write_picture(figure, file, dpi=150)


def write(folder: Path, name: str, report: dict[str, Any], table: str, show: bool = True) -> None:
    """Write NAME.json and NAME.md to `folder`, and print the table if `show`."""
    write_atomically(folder / f"{name}.json", to_json(report, indent=1).encode(), durable=False)
    write_atomically(folder / f"{name}.md", table.encode(), durable=False)
    if show:
        print(table)
