"""Check that the fused kernels learn like the paper's formulas: train once with each and compare the losses.

The reference materializes the attention matrices, and scales and adds outside the FFN's matrix. Both runs start from
the same weights and read the same samples, so they differ by rounding only. Writes learning.json, learning.md and
learning.png. The runs themselves stay in the output folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from parallel.processes.lifetime import tied
from train.benchmark import report as benchmark_report
from train.config import load_config
from train.run.reader import RunReader
from train.start.preflight import preflight

COMPUTATIONS = ("fused", "reference")


def main(argv: list[str]) -> int:
    """Train both and compare them. With --only, train one of them in this process."""
    options = parse(argv)
    if options.only:
        return train(options)
    preflight(load_config(options.config, options.overrides), 1)  # else both runs would report the faults
    benchmark_report.make_folder(options.output)
    processes = []
    for name in COMPUTATIONS:
        command = [sys.executable, "-m", "train.benchmark", "learning", *argv, "--only", name]
        processes.append(tied(command))
        if not options.at_once and processes[-1].wait():
            break
    if failed := [status for process in processes if (status := process.wait())]:
        return failed[0] if failed[0] > 0 else 1  # the run has said why, unless a signal ended it
    rows = {name: validations(options.output / name) for name in COMPUTATIONS}
    report = {"machine": benchmark_report.machine(), "overrides": options.overrides, "validations": rows}
    benchmark_report.write(options.output, "learning", report, as_table(report))
    plot(options.output)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark_report.add_arguments(parser, "runs/learning", "configs/ereg.json")
    parser.add_argument("--only", choices=COMPUTATIONS, help="train only this one, without a comparison")
    parser.add_argument("--at-once", action="store_true", help="run both at the same time, on the same device")
    return parser.parse_intermixed_args(argv)


def train(options: argparse.Namespace) -> int:
    """Train one of the two in its own folder. Return the exit status."""
    from train.main import main as train_main

    if options.only == "reference":
        use_reference()
    folder = options.output / options.only
    return train_main(["--config", options.config, *options.overrides, f"run_dir={folder}"])


def use_reference() -> None:
    """Make the model materialize attention matrices, and scale and add outside the FFN's matrix."""
    from torch import Tensor

    import model.transformer
    from model.entropy_attention import entropy_attention
    from model.entropy_attention.operators import separate
    from model.transformer import FeedForward

    def attend(
        qkv_TBN3H: Tensor, *, temperature: Tensor | None, document_start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, entropy = entropy_attention(
            *separate([qkv_TBN3H]),
            temperature=temperature,
            document_start=document_start,
            implementation="reference",
        )
        assert entropy is not None
        return output.permute(2, 0, 1, 3), entropy

    def feed_forward(self: FeedForward, x_TBD: Tensor, residual_TBD: Tensor) -> Tensor:
        if self.fused is not None:
            out_TBD = self.fused(x_TBD)
        else:
            assert self.up is not None and self.down is not None
            out_TBD = self.down(self.activation(self.up(x_TBD)))
        return residual_TBD + out_TBD if self.beta is None else self.beta * residual_TBD + out_TBD / self.alpha

    model.transformer.joint_entropy_attention = attend  # type: ignore[assignment]
    FeedForward.forward = feed_forward  # type: ignore[method-assign]


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics that have a validation loss."""
    return [row for row in RunReader(run).metrics() if "validation_loss" in row]


def as_table(report: dict[str, Any]) -> str:
    """Format the results as Markdown, one row per evaluation."""
    machine = report["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}",
        "",
        "| step | fused, nats | reference, nats | difference |",
        "|--:|--:|--:|--:|",
    ]
    for fused, reference in zip(*(report["validations"][name] for name in COMPUTATIONS), strict=True):
        ours, theirs = fused["validation_loss"], reference["validation_loss"]
        lines.append(f"| {fused['step']} | {ours:.4f} | {theirs:.4f} | {ours / theirs - 1:+.3%} |")
    return "\n".join(lines) + "\n"


def plot(folder: Path) -> None:
    """Draw the training losses of both runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in COMPUTATIONS:
        rows = RunReader(folder / name).metrics()
        steps = [row for row in rows if "ce_loss" in row]
        axes.plot([row["step"] for row in steps], [row["ce_loss"] for row in steps], linewidth=0.7, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.legend()
    figure.savefig(folder / "learning.png", dpi=150)
    pyplot.close(figure)
