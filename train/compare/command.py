"""Shows that layouts compute the same: runs the same global batches under each and compares with one process.

    python -m parallel.compare --config configs/quickstart.json --layouts tp=2,pp=2,tp=2:sp=1,cp=2,dp=2:zero=3
    python -m parallel.compare --config configs/ereg_1b.json --layouts tp=2:pp=2:dp=2 model.num_layers=4 --dtype float64

Each layout runs on processes of this machine: one GPU each where there are GPUs, else CPU processes. Weights stay at
their initial values. What runs is chosen by --dtype:

    configured   the program that trains: engine, precision, compiled blocks, CUDA graphs, recomputation as configured
    float32      the same engine in float32, not compiled
    float64      the same stages, not compiled, up to the gradients: DeepSpeed's optimizers refuse float64, so ZeRO
                 stages are no different there

The default is 'configured' where there are GPUs, and where training.precision = bf16 or training.compile = on is
named; else it is float32. Gradients are read from the optimizer (Adam's first moment with beta1 = 0).

Tokens are drawn at random from the whole vocabulary, so that every shard of the embedding is used and no data need be
read; of a dataset only its vocabulary is taken. Losses are thus near ln(vocabulary) and say nothing of training. With
data.attention_within_documents each sequence holds a few documents of random lengths.

Errors are relative (see train.compare.comparison). In float32 a layout beyond 1e-5 is not yet wrong: one process is
then measured in float64 too, and what it itself loses in float32 decides, unless --tolerance was given. A line says so.
As configured, layouts are compared with one process in float64 (float32 where that does not run), and each parameter
may be 1.5 times as far from it as one process in the configured arithmetic is, and one rounding; single numbers (alpha,
beta) 6 times as far as the one that is furthest. A gradient that is exactly zero or missing where there should be one
is named, and is a failure whatever its size. If one process itself loses one, no layout passes. Gradients smaller than
what they may be off are named: there only a loss would be seen.

Exit status: 0 all within what is allowed, 1 beyond it, 2 not comparable as asked.
"""

import argparse
import json
import re
import sys
from typing import Any

import torch

from data.command_line import output_file, print_faults, real_number, whole_number
from parallel.launch import choose_accelerator
from parallel.layout import KEYS, Layout, parse_layout
from parallel.local_ranks import RankError
from parallel.names import listed
from train.compare.comparison import ROUNDING_FACTOR, TOLERANCE
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import CONFIGURED
from train.compare.reference import OneProcess, OneProcessAsTrained
from train.config import Config, ConfigError, load_config
from train.run.folder import finite_or_none


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    choose_accelerator()
    try:
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
        options.json.write_text("".join(json.dumps(line) + "\n" for line in whole))
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
    print(f"{plain.words}, global batches of {global_batch_size} random sequences; one process:")
    for batch, (cross_entropy, entropy_loss, norm) in enumerate(plain.measured.losses.tolist()):
        print(
            f"  batch {batch}: loss {cross_entropy + entropy_loss:.8f}, of which the regularizer {entropy_loss:.3e}; "
            f"gradient norm {norm:.6e}"
        )
    for warning in plain.warnings:
        print(f"  {warning}")


def print_summary(plain: OneProcess, lines: list[dict[str, Any]]) -> None:
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
    keys = ", ".join(f"{name} ({meaning})" for name, meaning in KEYS.items())
    parser = argparse.ArgumentParser(
        prog="python -m parallel.compare",
        description=__doc__,
        epilog=f"A layout is key=value joined by colons; keys: {keys}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument("--layouts", required=True, metavar="LIST", help="layouts separated by commas")
    parser.add_argument(
        "--dtype",
        choices=[CONFIGURED, *TOLERANCE],
        help="what runs, see above (default: configured where there are GPUs or it is asked for, else float32)",
    )
    parser.add_argument("--batches", type=whole_number(1), default=2, metavar="N", help="global batches (default 2)")
    parser.add_argument(
        "--tolerance",
        type=real_number(0),
        metavar="X",
        help="largest error (default 1e-10 in float64; in float32 1e-5 or rounding; not with configured)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write a JSON line for each layout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of single keys")
    return parser.parse_intermixed_args(arguments)


def default_dtype(config: Config) -> str:
    """What runs unless --dtype says: the program that trains where it has GPUs, or a choice of its arithmetic is named;
    float32 else.
    """
    training, on_gpu = config.training, torch.cuda.is_available()
    is_named = training.resolved_precision(on_gpu) == "bf16" or training.compiles(on_gpu)
    return CONFIGURED if on_gpu or is_named else "float32"


def check_devices(layouts: list[Layout]) -> None:
    """Raises ConfigError where a layout needs more GPUs than this machine has; CPU processes are not limited."""
    gpus = torch.cuda.device_count()
    faults = [
        f"layout {layout} needs {layout.world_size} GPUs, and this machine has {gpus}; compare on CPU processes with "
        "DS_ACCELERATOR=cpu in the environment"
        for layout in layouts
        if torch.cuda.is_available() and layout.world_size > gpus
    ]
    if faults:
        raise ConfigError(faults)
