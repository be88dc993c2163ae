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
import dataclasses
import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data.arguments import output_file, real_number, whole_number
from data.errors import print_faults
from parallel.launch import choose_accelerator
from parallel.layout import KEYS, Layout, parse_layout
from parallel.local_ranks import RankError
from parallel.names import listed
from train.compare.comparison import ROUNDING_FACTOR, TOLERANCE, Allowance, Comparison, compare
from train.compare.measurement import CONFIGURED, END_OF_DOCUMENT, Measured, measure
from train.config import Config, ConfigError, load_config, section_faults, world_faults
from train.config.vocabulary import dataset_if_there, vocabulary
from train.run.folder import finite_or_none

DOCUMENTS_A_SEQUENCE = 4  # on average


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
        configured = options.dtype == CONFIGURED
        configs = [apply_layout(config, layout, reference, configured) for layout in layouts]
        check_devices(layouts)
        vocab_size, batches = global_batches(config, options.batches)
    except ValueError as error:
        print_faults(error)
        return 2
    one = apply_layout(config, reference, reference, configured)
    plain: OneProcess
    if configured:
        plain = OneProcessAsTrained(one, apply_layout(config, reference, reference), vocab_size, batches)
    else:
        plain = OneProcess(one, vocab_size, batches, options.dtype, options.tolerance)
    print(f"{plain.words}, global batches of {config.training.global_batch_size} random sequences; one process:")
    for batch, (cross_entropy, entropy_loss, norm) in enumerate(plain.measured.losses.tolist()):
        print(
            f"  batch {batch}: loss {cross_entropy + entropy_loss:.8f}, of which the regularizer {entropy_loss:.3e}; "
            f"gradient norm {norm:.6e}"
        )
    for warning in plain.warnings:
        print(f"  {warning}")
    width = max(6, *(len(str(layout)) for layout in layouts))
    print(f"\n{'layout':<{width}}  ranks     loss  grad norm  entropies  gradients  worst parameter")
    lines: list[dict[str, Any]] = []
    for layout, applied in zip(layouts, configs, strict=True):
        named = {"layout": str(layout), "ranks": layout.world_size, "dtype": options.dtype}
        lines.append({**named, "tolerance": plain.tolerance, **plain.try_layout(applied, layout)})
        print(f"{layout!s:<{width}}  {layout.world_size:5d}  {row(lines[-1])}", flush=True)
    if options.json is not None:
        whole = [{key: finite_or_none(value) for key, value in line.items()} for line in lines]
        options.json.write_text("".join(json.dumps(line) + "\n" for line in whole))
    failed = sum(not line["passed"] for line in lines)
    print(f"\n{len(layouts) - failed} of {len(layouts)} layouts equal one process within {plain.limit_words}")
    if lost := next((line["rounding"] for line in lines if line["passed"] and line["rounding"]), None):
        print(
            f"rounding: within {ROUNDING_FACTOR:g} times what float32 loses on one process against float64, up to "
            f"{lost['gradient']:.1e} of {lost['worst_parameter']}; --dtype float64 shows more"
        )
    return 1 if failed else 0


class OneProcess:
    """What layouts are held to.

    Args:
        config: of one process.
        tolerance: the largest error, if the user names one; then float32's rounding is no excuse.
    """

    def __init__(
        self, config: Config, vocab_size: int, batches: Tensor, dtype: str, tolerance: float | None = None
    ) -> None:
        self.config, self.vocab_size, self.batches, self.dtype = config, vocab_size, batches, dtype
        self.tolerance: float | None = TOLERANCE[dtype] if tolerance is None else tolerance
        self.excused = dtype == "float32" and tolerance is None
        self.measured = self.measure(config, 1, dtype)

    def measure(self, config: Config, world_size: int, dtype: str) -> Measured:
        """What a layout finds in the same batches."""
        return measure(config, world_size, self.vocab_size, self.batches, dtype)

    @property
    def words(self) -> str:
        """What one process and the layouts run in."""
        return self.dtype

    @property
    def limit_words(self) -> str:
        return f"{self.tolerance:g}"

    @property
    def warnings(self) -> list[str]:
        """What keeps layouts from being judged, or from being judged closely."""
        return []

    @cached_property
    def rounding(self) -> Comparison | None:
        """What float32 loses on one process; None where it is no excuse, or float64 does not run."""
        try:
            return compare(self.measured, self.measure(self.config, 1, "float64")) if self.excused else None
        except RankError:
            return None

    def try_layout(self, config: Config, layout: Layout) -> dict[str, Any]:
        """A layout's errors and whether they are within what is allowed, or how it failed to run."""
        try:
            found = self.measure(config, layout.world_size, self.dtype)
        except RankError as error:
            return {"error": str(error).strip(), "rounding": None, "passed": False}
        return {**self.judge(found), "sent_bytes": found.sent_bytes}

    def judge(self, found: Measured) -> dict[str, Any]:
        """Errors and verdict."""
        assert self.tolerance is not None
        result = compare(found, self.measured)
        rounding = None if result.within(self.tolerance) else self.rounding
        passed = result.within(self.tolerance, rounding)
        return {**dataclasses.asdict(result), "rounding": rounding and dataclasses.asdict(rounding), "passed": passed}


class OneProcessAsTrained(OneProcess):
    """One process in float64, and what layouts may be off in the arithmetic of training: as much as one process there.

    Args:
        config: of one process, as it would train.
        exact: the same, uncompiled and in float32 at least.
    """

    def __init__(self, config: Config, exact: Config, vocab_size: int, batches: Tensor) -> None:
        self.config, self.vocab_size, self.batches, self.dtype = config, vocab_size, batches, CONFIGURED
        self.tolerance, self.excused = None, False
        self.truth_dtype = "float64"
        try:
            self.measured = self.measure(exact, 1, "float64")
        except RankError:  # too large, for instance
            self.truth_dtype = "float32"
            self.measured = self.measure(exact, 1, "float32")
        self.precision = config.training.resolved_precision(torch.cuda.is_available())
        self.allowance = Allowance.of(self.measure(config, 1, CONFIGURED), self.measured, self.precision)

    @property
    def words(self) -> str:
        compiled = "compiled" if self.config.training.compiles(torch.cuda.is_available()) else "not compiled"
        return f"layouts in {self.precision}, {compiled}, as they train, against {self.truth_dtype}"

    @property
    def limit_words(self) -> str:
        return "its own rounding in that arithmetic"

    @property
    def warnings(self) -> list[str]:
        lost, unseen = self.allowance.lost, self.allowance.unseen
        said = [f"LOST by one process as it trains, so that no layout passes: {listed(lost)}"] if lost else []
        small = f"too small to be seen in {self.precision}, unless lost (--dtype float64 shows more): {listed(unseen)}"
        return [*said, small] if unseen else said

    def judge(self, found: Measured) -> dict[str, Any]:
        result = compare(found, self.measured, self.allowance)
        allowed = self.allowance.gradient[result.worst_parameter]
        passed = self.allowance.covers(result)
        one_process = {"lost_by_one_process": self.allowance.lost, "unseen": self.allowance.unseen}
        return {**dataclasses.asdict(result), "allowed": allowed, **one_process, "rounding": None, "passed": passed}


def row(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"FAILED  {line['error'].splitlines()[-1]}"
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


def apply_layout(config: Config, layout: Layout, reference: Layout, as_configured: bool = False) -> Config:
    """The run's configuration under a layout: the global batch stays, the micro-batch follows from acc and dp.

    Args:
        as_configured: whether precision and compiling stay too; else float32, not compiled.

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
        precision=config.training.precision if as_configured else "fp32",
        compile=config.training.compile if as_configured else "off",
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
    vocab_size, _ = vocabulary(config, dataset_if_there(config))
    shape = (count, config.training.global_batch_size, config.model.seq_length + 1)
    generator = torch.Generator().manual_seed(config.training.seed)
    tokens = torch.randint(0, vocab_size, shape, generator=generator)
    if config.data.attention_within_documents:
        ends = torch.rand(shape, generator=generator) < DOCUMENTS_A_SEQUENCE / config.model.seq_length
        tokens = torch.where(ends, END_OF_DOCUMENT, tokens)
    return vocab_size, tokens
