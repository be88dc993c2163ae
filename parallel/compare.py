"""Shows that layouts compute the same: runs the same global batches under each and compares with one process.

    python -m parallel.compare --config configs/quickstart.json --layouts tp=2,pp=2,tp=2:sp=1,cp=2,dp=2:zero=3
    python -m parallel.compare --config configs/ereg_1b.json --layouts tp=2:pp=2:dp=2 model.num_layers=4 --dtype float64

Each layout runs on processes of this machine: one GPU each where there are GPUs, else CPU processes. Weights stay at
their initial values. In float32 the whole training engine runs, and gradients are read from its optimizer (Adam's first
moment with beta1 = 0); in float64, which DeepSpeed's optimizers refuse, gradients are taken before the optimizer, so
ZeRO stages are no different there.

Tokens are drawn at random from the whole vocabulary, so that every shard of the embedding is used and no data need be
read; of a dataset only its vocabulary is taken. Losses are thus near ln(vocabulary) and say nothing of training. With
data.attention_within_documents each sequence holds a few documents of random lengths.

A gradient's error is |found - expected| / max(|expected|, 1e-2 |all gradients|): with the tolerance of 1e-5 that is a
ten-millionth of all gradients, float32's own resolution, below which rounding would decide. A key bias is measured
against |all gradients|: its gradient is zero in exact arithmetic, since softmax ignores what is added to all keys
alike, and what is found is rounding. Exit status: 0 all within the tolerance, 1 beyond it, 2 not comparable as asked.
"""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.arguments import real_number, whole_number
from data.errors import run_command
from parallel.launch import choose_accelerator
from parallel.layout import KEYS, Layout, parse_layout
from parallel.local_ranks import RankError
from parallel.measurement import END_OF_DOCUMENT, Measured, measure
from train.config import Config, ConfigError, load_config, section_faults, world_faults

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DOCUMENTS_A_SEQUENCE = 4  # on average
GRADIENT_FLOOR, KEY_BIAS_FLOOR = 1e-2, 1.0  # of the norm of all gradients


@dataclass(frozen=True)
class Comparison:
    """Errors of one layout against one process, relative but for entropies, the largest over batches."""

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: float
    worst_parameter: str

    def within(self, tolerance: float) -> bool:
        errors = (self.loss, self.gradient_norm, self.entropy_nats, self.gradient)
        return all(error <= tolerance for error in errors)  # NaN is beyond any


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    choose_accelerator()
    try:
        config = load_config(options.config, options.overrides)
        layouts = [parse_layout(text) for text in options.layouts.split(",")]
        reference = reference_layout(config, layouts)
        configs = [apply_layout(config, layout, reference) for layout in layouts]
        check_devices(layouts)
        check_output(options.json)
        vocab_size, batches = global_batches(config, options.batches)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    expected = measure(apply_layout(config, reference, reference), 1, vocab_size, batches, options.dtype)
    print(f"{options.dtype}, global batches of {config.training.global_batch_size} random sequences; one process:")
    for batch, (cross_entropy, entropy_loss, norm) in enumerate(expected.losses.tolist()):
        print(
            f"  batch {batch}: loss {cross_entropy + entropy_loss:.8f}, of which the regularizer {entropy_loss:.3e}; "
            f"gradient norm {norm:.6e}"
        )
    width = max(6, *(len(str(layout)) for layout in layouts))
    print(f"\n{'layout':<{width}}  ranks     loss  grad norm  entropies  gradients  worst parameter")
    lines: list[dict[str, Any]] = []
    for layout, applied in zip(layouts, configs, strict=True):
        named = {"layout": str(layout), "ranks": layout.world_size, "dtype": options.dtype, "tolerance": tolerance}
        lines.append({**named, **try_layout(applied, layout, vocab_size, batches, options.dtype, expected, tolerance)})
        print(f"{layout!s:<{width}}  {layout.world_size:5d}  {row(lines[-1])}", flush=True)
    if options.json is not None:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    failed = sum(not line["passed"] for line in lines)
    print(f"\n{len(layouts) - failed} of {len(layouts)} layouts equal one process within {tolerance:g}")
    return 1 if failed else 0


def try_layout(
    config: Config, layout: Layout, vocab_size: int, batches: Tensor, dtype: str, expected: Measured, tolerance: float
) -> dict[str, Any]:
    """A layout's errors and whether they are within the tolerance, or how it failed to run."""
    try:
        found = measure(config, layout.world_size, vocab_size, batches, dtype)
    except RankError as error:
        return {"error": str(error).strip(), "passed": False}
    result = compare(found, expected)
    return {**dataclasses.asdict(result), "sent_bytes": found.sent_bytes, "passed": result.within(tolerance)}


def row(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"FAILED  {line['error'].splitlines()[-1]}"
    return (
        f"{line['loss']:7.1e}    {line['gradient_norm']:7.1e}    {line['entropy_nats']:7.1e}    "
        f"{line['gradient']:7.1e}  {line['worst_parameter']}{'' if line['passed'] else '  BEYOND'}"
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
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="arithmetic (default float32)")
    parser.add_argument("--batches", type=whole_number(1), default=2, metavar="N", help="global batches (default 2)")
    parser.add_argument(
        "--tolerance",
        type=real_number(0),
        metavar="X",
        help="largest error (default 1e-5, in float64 1e-10)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a JSON line for each layout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of single keys")
    return parser.parse_intermixed_args(arguments)


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


def check_output(file: Path | None) -> None:
    """Raises ConfigError where the lines could not be written once all is measured."""
    if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()):
        raise ConfigError([f"--json {file}: cannot be written there; name a file in a folder that exists"])


def reference_layout(config: Config, layouts: list[Layout]) -> Layout:
    """The one process that all `layouts` are compared with; micro-batches equal, and no larger than configured.

    `per_head` averages a head's entropy over one micro-batch of all data-parallel ranks before it squares, so its value
    depends on micro_batch_size x dp, and layouts are comparable at one number of micro-batches only.

    Raises:
        ConfigError: the granularity is per_head and the layouts differ in their number of micro-batches.
    """
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    default = next(acc for acc in range(1, batch + 1) if batch % acc == 0 and batch // acc <= micro_batch)
    counts = sorted({layout.acc or default for layout in layouts})
    if not (config.model.regularized and config.regularizer.granularity == "per_head"):
        return Layout(acc=default)
    if len(counts) > 1:
        raise ConfigError(
            [
                f"regularizer.granularity = 'per_head' averages over micro_batch_size x dp sequences before squaring, "
                f"so layouts must agree in acc, not have {counts}; give all of them one acc, or compare per_query"
            ]
        )
    return Layout(acc=counts[0])


def apply_layout(config: Config, layout: Layout, reference: Layout) -> Config:
    """The run's configuration under a layout: the global batch stays, the micro-batch follows from acc and dp.

    Raises:
        ConfigError: the sizes do not fit together, with every reason.
    """
    acc, batch = layout.acc or reference.acc or 1, config.training.global_batch_size
    if batch % (acc * layout.dp):
        raise ConfigError(
            [
                f"layout {layout}: training.global_batch_size = {batch} is not a multiple of acc({acc}) * "
                f"dp({layout.dp}) = {acc * layout.dp}; change one of them"
            ]
        )
    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=bool(layout.sp),
        zero_stage=layout.zero,  # type: ignore[arg-type]
        fused_ffn=config.parallel.fused_ffn if layout.sp else "auto",
    )
    training = dataclasses.replace(
        config.training,
        micro_batch_size=batch // (acc * layout.dp),
        activation_recompute=layout.recompute,  # type: ignore[arg-type]
        precision="fp32",
        compile="off",
    )
    applied = dataclasses.replace(config, parallel=parallel, training=training)
    faults = section_faults(applied) + world_faults(applied, layout.world_size)
    if faults:
        raise ConfigError([f"layout {layout}: {fault}" for fault in faults])
    return applied


def global_batches(config: Config, count: int) -> tuple[int, Tensor]:
    """The vocabulary, and `count` global batches of random tokens: [count, batch, T + 1] int64.

    The vocabulary is the dataset's, or without one data.planned_vocab_size. For attention within documents, documents
    end at random positions.
    """
    from train.dry_run import dataset_if_there, vocabulary

    vocab_size, _ = vocabulary(config, dataset_if_there(config))
    shape = (count, config.training.global_batch_size, config.model.seq_length + 1)
    generator = torch.Generator().manual_seed(config.training.seed)
    tokens = torch.randint(0, vocab_size, shape, generator=generator)
    if config.data.attention_within_documents:
        ends = torch.rand(shape, generator=generator) < DOCUMENTS_A_SEQUENCE / config.model.seq_length
        tokens = torch.where(ends, END_OF_DOCUMENT, tokens)
    return vocab_size, tokens


def compare(found: Measured, expected: Measured) -> Comparison:
    """The largest errors over all batches."""
    worst = max(
        (_worst_gradient(a, b) for a, b in zip(found.gradients, expected.gradients, strict=True)),
        key=lambda pair: pair[0] if pair[0] == pair[0] else float("inf"),
    )
    relative = _relative(found.losses, expected.losses)
    whole = _relative(found.losses[:, :2].sum(1), expected.losses[:, :2].sum(1))
    return Comparison(
        loss=float(torch.maximum(whole.max(), relative[:, 0].max())),
        gradient_norm=float(relative[:, 2].max()),
        entropy_nats=float((torch.stack(found.entropy_nats) - torch.stack(expected.entropy_nats)).abs().max()),
        gradient=worst[0],
        worst_parameter=worst[1],
    )


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp_min(1e-30)  # a single token has loss 0


def _worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().clamp_min(1e-30)
    errors = {}
    for name, gradient in expected.items():
        floor = KEY_BIAS_FLOOR if name.endswith("key_bias") else GRADIENT_FLOOR
        errors[name] = float((found[name] - gradient).norm() / torch.maximum(gradient.norm(), floor * whole))
    return max(((error, name) for name, error in errors.items()), key=lambda pair: (pair[0] != pair[0], pair[0]))


if __name__ == "__main__":
    run_command(main)
