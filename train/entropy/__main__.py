"""Measure the attention entropy of every head of a trained model on a text:

    python -m train.entropy --text book.txt models/gpt2
    python -m train.entropy --text book.txt --run runs/quickstart --output entropies

The model is a folder of the transformers library (any decoder with causal softmax attention), or a run. The text is cut
into sequences of T tokens; an incomplete one at its end is left out. Entropies are means over sequences and positions.
train/run/entropy_words.py defines collapse and overload.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.command_line import path_argument, print_faults, read_text, run_command, whole_number
from data.errors import DataError
from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.config import ConfigError
from train.run.entropy_words import CLASSES, Entropies, ceiling_nats, class_of, class_shares, describe
from train.run.reader import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_LENGTH = 2


class Model(Protocol):
    """A model whose entropies can be measured: train/entropy/own.py or others.py."""

    name: str
    longest: int
    usual_length: int

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and those that stand before every sequence."""

    def load(self, device: "torch.device", dtype: "torch.dtype") -> None:
        """Read the weights."""

    def head_entropies(self, tokens_BT: "Tensor") -> "list[Tensor]":
        """Run whole sequences; return each layer's mean entropies over positions in nats, [B, N]."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from torch import OutOfMemoryError

    from train.checkpoint.root import CheckpointError

    try:
        report = measured(options)
        if options.output is not None:
            write(options.output, report)
    except (ConfigError, DataError, RunError, CheckpointError) as error:
        print_faults(error)
        return 2
    except OutOfMemoryError:
        print_faults(DataError("the device's memory is too small; lower --batch-size, or take --dtype bfloat16"))
        return 2
    print(to_json(report) if options.json else as_text(report))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    from train.checkpoint.whole import add_model_arguments

    parser = argparse.ArgumentParser(
        prog="python -m train.entropy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=path_argument, metavar="MODEL_DIR", help="folder of a model of transformers")
    add("--run", type=path_argument, metavar="DIR", help="folder of a run that has a checkpoint, instead")
    add("--text", required=True, type=path_argument, metavar="FILE", help="what the model reads, in UTF-8")
    add(
        "--seq-length",
        type=whole_number(LEAST_LENGTH),
        metavar="T",
        help="tokens of a sequence (default: a run's seq_length; else what the model allows, at most 1024)",
    )
    add("--samples", type=whole_number(1), metavar="N", help="read the first N sequences only (default: all)")
    add("--batch-size", type=whole_number(1), default=8, metavar="B", help="sequences at a time (default: 8)")
    add("--output", type=path_argument, metavar="DIR", help="write entropy.json, head_map.png and head_shares.png")
    add("--json", action="store_true", help="print the report as JSON")
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.run is None):
        parser.error("name one model: MODEL_DIR or --run DIR")
    if options.model is not None and (options.step is not None or options.data is not None):
        parser.error("--step and --data choose a run's weights and tokenizer; they need --run")
    return options


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for.

    Returns:
        The report: `entropy_nats` [L][N], the ceiling, the share of heads in each class, and the result in words.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: it cannot be measured.
    """
    from train.checkpoint.whole import DTYPES, chosen_device

    text, device = read_text(options.text), chosen_device(options.device)
    model = opened(options)
    tokens, begin = model.encode(text)
    length = options.seq_length or min(model.usual_length, len(begin) + len(tokens))
    if length > model.longest:
        raise DataError(f"--seq-length {length}: {model.name} reads at most {model.longest} tokens")
    sequences = cut(tokens, begin, length, options.samples) if length >= LEAST_LENGTH else []
    if not sequences:
        raise DataError(
            f"{options.text}: has {len(tokens)} tokens, less than a sequence of {max(length, LEAST_LENGTH)}; give a "
            "longer text or a smaller --seq-length"
        )
    model.load(device, DTYPES[options.dtype])
    entropy_nats = mean_entropies(model, sequences, options.batch_size, device)
    return {
        "model": model.name,
        "text": str(options.text),
        "seq_length": length,
        "sequences": len(sequences),
        "ceiling_nats": ceiling_nats(length),
        "entropy_nats": entropy_nats,
        "class_shares": dict(zip(CLASSES, class_shares(entropy_nats, length), strict=True)),
        "words": describe(entropy_nats, length),
    }


def opened(options: argparse.Namespace) -> Model:
    """Open the model that the command line names, without its weights."""
    if options.run is not None:
        from train.entropy.own import OwnModel

        return OwnModel(options.run, options.step, options.data, options.allow_commands)
    from train.entropy.others import OtherModel

    return OtherModel(options.model)


def cut(tokens: list[int], begin: list[int], length: int, samples: int | None) -> list[list[int]]:
    """Cut a text's tokens into whole sequences of `length`, each of which starts with `begin`."""
    new = length - len(begin)
    starts = range(0, len(tokens) - new + 1, max(new, 1))
    return [[*begin, *tokens[start : start + new]] for start in starts[:samples]]


def mean_entropies(model: Model, sequences: list[list[int]], batch_size: int, device: "torch.device") -> Entropies:
    """Return the mean entropy of each head over sequences and positions in nats, [L][N]."""
    import torch

    parts_LN = []
    with torch.inference_mode():
        for first in range(0, len(sequences), batch_size):
            tokens_BT = torch.tensor(sequences[first : first + batch_size], device=device)
            parts_LN.append(torch.stack([each_BN.double().sum(0) for each_BN in model.head_entropies(tokens_BT)]))
    means: Entropies = (torch.stack(parts_LN).sum(0) / len(sequences)).tolist()
    return means


def as_text(report: dict[str, Any]) -> str:
    """Return a report as a table with a row for each layer, and what it shows in words."""
    length, ceiling, layers = report["seq_length"], report["ceiling_nats"], report["entropy_nats"]
    lines = [
        f"{report['model']}: {len(layers)} layers of {len(layers[0])} heads",
        f"{report['sequences']} sequences of {length} tokens; largest mean entropy ln(T!)/T = {ceiling:.3f} nats",
        "",
        "layer  mean nats  lowest  highest  of ceiling  collapsed  overloaded",
    ]
    for layer, heads in enumerate(layers):
        mean = sum(heads) / len(heads)
        classes = [class_of(entropy, length) for entropy in heads if math.isfinite(entropy)]
        lines.append(
            f"{layer:5}  {mean:9.3f}  {min(heads):6.3f}  {max(heads):7.3f}  {mean / ceiling:10.1%}  "
            f"{classes.count(0):9}  {classes.count(len(CLASSES) - 1):10}"
        )
    shares = "  ".join(f"{name} {share:.1%}" for name, share in report["class_shares"].items())
    return "\n".join([*lines, "", f"heads by share of the ceiling: {shares}", report["words"]])


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write the report and its pictures.

    Raises:
        DataError: the folder cannot be written.
    """
    from train.pictures import maps, plots
    from train.pictures.files import write_picture

    length, entropies = report["seq_length"], report["entropy_nats"]
    title = f"{Path(report['model']).name}\n{report['sequences']} sequences of {length} tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "entropy.json", to_json(report, indent=1) + "\n")
        write_picture(maps.head_map_figure(entropies, length, title), folder / "head_map.png", dpi=150)
        write_picture(plots.classes_figure(entropies, length, title), folder / "head_shares.png", dpi=150)
    except OSError as error:
        raise DataError(f"--output {folder}: cannot be written ({error.strerror}); choose another folder") from None


if __name__ == "__main__":
    run_command(main)
