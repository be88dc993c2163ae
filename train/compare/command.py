"""Check that layouts compute what one process computes: losses, entropies and the gradient of every parameter.

    python -m parallel.compare --config configs/quickstart.json --layouts tp=2,pp=2,tp=2:sp=1,cp=2,dp=2:zero=3
    python -m parallel.compare --config configs/ereg_1b.json --layouts tp=2:pp=2:dp=2 model.num_layers=4 --dtype float64

Each layout runs the same global batches on processes of this machine. With GPUs, each process takes one; without, all
run on the CPU. Weights stay at their initial values. --dtype chooses what runs:

    configured   the program that trains: engine, precision, compiled blocks, CUDA graphs, recomputation as configured
    float32      the same engine in float32, not compiled
    float64      the same stages, not compiled, up to the gradients. DeepSpeed's optimizers refuse float64, so ZeRO
                 stages make no difference here.

The default is 'configured' on GPUs, and if the configuration sets training.precision = bf16 or training.compile = on.
Otherwise it is float32. Gradients are read from the optimizer: with beta1 = 0 they are Adam's first moment.

Tokens are random, drawn from the whole vocabulary, so every shard of the embedding is used. Only the vocabulary size is
read from the dataset. Losses are therefore near ln(vocabulary). With data.attention_within_documents each sequence
holds a few documents of random lengths.

What is allowed (train/compare/comparison.py has the details; errors are relative):

    float64      1e-10
    float32      1e-5. If a layout exceeds that, one process is also measured in float64, and the layout may lose five
                 times what float32 itself loses there. The table then says "rounding". --tolerance turns this off.
    configured   One process in float64 is the reference (float32 if that does not run). Each parameter's error may be
                 1.5 times that of one process in the configured arithmetic, plus one rounding. Single numbers (alpha,
                 beta) may have 6 times the largest error among them.

A gradient that is exactly zero or missing, where one is expected, fails a layout whatever its size, and is named LOST.
If one process itself loses one, no layout passes. Gradients smaller than their allowed error are named: of these, only
a loss would be noticed.

Exit status: 0 all layouts are within what is allowed, 1 some are not, 2 the comparison cannot run as asked.
"""

import argparse
import re
import sys
from typing import Any

import torch

from data.command_line import output_file, print_faults, real_number, whole_number
from data.files.strict_json import finite_or_none, to_json
from parallel.launch import choose_accelerator
from parallel.layout import KEYS, Layout, parse_layout
from parallel.local_ranks import RankError
from parallel.names import listed
from parallel.processes.place import forget_launcher
from train.compare.comparison import ROUNDING_FACTOR, TOLERANCE
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import CONFIGURED
from train.compare.reference import OneProcess, OneProcessAsTrained
from train.config import Config, ConfigError, load_config
from train.start.compiled_code import keep_compiled_code_private


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    forget_launcher()
    choose_accelerator()
    try:
        keep_compiled_code_private()
        config = load_config(options.config, options.overrides)
        options.dtype = options.dtype or default_dtype(config)
        if options.dtype == CONFIGURED and options.tolerance is not None:
            raise ConfigError(["--tolerance: in the configured arithmetic one process sets it; name a --dtype too"])
        layouts = [parse_layout(text) for text in options.layouts.split(",")]
        reference = reference_layout(config, layouts)
        configs = [apply_layout(config, layout, reference, options.dtype == CONFIGURED) for layout in layouts]
        check_devices(layouts)
        plain = measure_reference(config, reference, options)
    except ValueError as error:
        print_faults(error)
        return 2
    except RankError as error:
        print(
            f"error: the one process that layouts are compared with did not run: {reason(str(error))}", file=sys.stderr
        )
        return 2
    print_reference(plain, config.training.global_batch_size)
    lines = compare_layouts(plain, layouts, configs, options.dtype)
    if options.json is not None:
        whole = [{key: finite_or_none(value) for key, value in line.items()} for line in lines]
        options.json.write_text("".join(to_json(line) + "\n" for line in whole))
    print_summary(plain, lines)
    return 0 if all(line["passed"] for line in lines) else 1


def measure_reference(config: Config, reference: Layout, options: argparse.Namespace) -> OneProcess:
    """Measure the one process that layouts are compared with.

    Raises:
        ConfigError: the vocabulary is unknown.
        RankError: the process failed.
    """
    vocab_size, batches = global_batches(config, options.batches)
    exact = apply_layout(config, reference, reference)
    if options.dtype == CONFIGURED:
        as_trained = apply_layout(config, reference, reference, as_configured=True)
        return OneProcessAsTrained(as_trained, exact, vocab_size, batches)
    return OneProcess(exact, vocab_size, batches, options.dtype, options.tolerance)


def compare_layouts(
    plain: OneProcess, layouts: list[Layout], configs: list[Config], dtype: str
) -> list[dict[str, Any]]:
    """Run every layout, print a table row for each as it ends, and return the lines of the JSON file."""
    width = max(6, *(len(str(layout)) for layout in layouts))
    print(f"\n{'layout':<{width}}  ranks     loss  grad norm  entropies  gradients  worst parameter")
    lines: list[dict[str, Any]] = []
    for layout, applied in zip(layouts, configs, strict=True):
        named = {"layout": str(layout), "ranks": layout.world_size, "dtype": dtype}
        lines.append({**named, "tolerance": plain.tolerance, **plain.try_layout(applied, layout)})
        print(f"{layout!s:<{width}}  {layout.world_size:5d}  {row(lines[-1])}", flush=True)
    return lines


def print_reference(plain: OneProcess, global_batch_size: int) -> None:
    """Print losses and gradient norm of one process, which layouts are compared with."""
    print(f"{plain.words}, global batches of {global_batch_size} random sequences; one process:")
    for batch, (cross_entropy, entropy_loss, norm) in enumerate(plain.measured.losses.tolist()):
        print(
            f"  batch {batch}: loss {cross_entropy + entropy_loss:.8f}, of which the regularizer {entropy_loss:.3e}; "
            f"gradient norm {norm:.6e}"
        )
    for warning in plain.warnings:
        print(f"  {warning}")


def print_summary(plain: OneProcess, lines: list[dict[str, Any]]) -> None:
    """Print how many layouts passed, and within what."""
    passed = sum(line["passed"] for line in lines)
    print(f"\n{passed} of {len(lines)} layouts equal one process within {plain.limit_words}")
    if lost := next((line["rounding"] for line in lines if line["passed"] and line["rounding"]), None):
        print(
            f"rounding: within {ROUNDING_FACTOR:g} times what float32 loses on one process against float64, up to "
            f"{lost['gradient']:.1e} of {lost['worst_parameter']}; --dtype float64 shows more"
        )


def reason(text: str) -> str:
    """Return the last line of a failed rank's traceback. The class of an error of this project is left out."""
    last = text.strip().splitlines()[-1]
    return re.sub(r"^(data|model|parallel|train)\.[\w.]+: ", "", last)


def row(line: dict[str, Any]) -> str:
    """Format one layout's errors and verdict for the table."""
    if "error" in line:
        return f"FAILED  {reason(line['error'])}"
    verdict = "  BEYOND" if not line["passed"] else "  rounding" if line["rounding"] else ""
    if line["lost"]:
        verdict = f"  LOST: {listed(line['lost'])}"
    allowed = f" (of {line['allowed']:.1e})" if "allowed" in line else ""
    return (
        f"{line['loss']:7.1e}    {line['gradient_norm']:7.1e}    {line['entropy_nats']:7.1e}    "
        f"{line['gradient']:7.1e}{allowed}  {line['worst_parameter']}{verdict}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    keys = ", ".join(f"{name} ({meaning})" for name, meaning in KEYS.items())
    parser = argparse.ArgumentParser(
        prog="python -m parallel.compare",
        description=__doc__,
        epilog=f"A layout is key=value joined by colons; keys: {keys}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON configuration, for instance configs/quickstart.json"
    )
    parser.add_argument("--layouts", required=True, metavar="LIST", help="layouts, separated by commas")
    parser.add_argument(
        "--dtype",
        choices=[CONFIGURED, *TOLERANCE],
        help="what runs, see above (default: configured on GPUs or if the configuration asks for it, else float32)",
    )
    parser.add_argument(
        "--batches", type=whole_number(1), default=2, metavar="N", help="number of global batches (default: 2)"
    )
    parser.add_argument(
        "--tolerance",
        type=real_number(0),
        metavar="X",
        help="largest error (default: 1e-10 in float64, 1e-5 or rounding in float32; not with configured)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write one JSON line per layout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    return parser.parse_intermixed_args(arguments)


def default_dtype(config: Config) -> str:
    """Return the default of --dtype: `configured` on GPUs or if bf16 or compiling is set, else float32."""
    training, on_gpu = config.training, torch.cuda.is_available()
    is_named = training.resolved_precision(on_gpu) == "bf16" or training.compiles(on_gpu)
    return CONFIGURED if on_gpu or is_named else "float32"


def check_devices(layouts: list[Layout]) -> None:
    """Raise ConfigError if a layout needs more GPUs than this machine has. CPU processes are not limited."""
    gpus = torch.cuda.device_count()
    faults = [
        f"layout {layout} needs {layout.world_size} GPUs, and this machine has {gpus}; compare on CPU processes with "
        "DS_ACCELERATOR=cpu in the environment"
        for layout in layouts
        if torch.cuda.is_available() and layout.world_size > gpus
    ]
    if faults:
        raise ConfigError(faults)
