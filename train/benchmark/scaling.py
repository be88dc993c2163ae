"""Measure how training scales over the GPUs of this machine: a list of layouts, and plain PyTorch beside them.

    python -m train.benchmark scaling --config configs/ereg_1b.json
    python -m train.benchmark scaling --config configs/ereg_1b.json --layouts dp=2 tp=2:sp=1 pp=2:acc=8 --peers FSDP2

Each row trains in processes of its own, one GPU first. Then come the layouts, and peers: a GPT-2 (LayerNorm, GELU) of
equal width and depth in plain PyTorch, which on one GPU is its own baseline. All start from the same weights and read
the same random tokens, or those of data.path if it is a dataset. So rows of equal program and batch have the same
losses.

By default each GPU gets as many sequences a step as training.global_batch_size says, whatever their number (weak
scaling). With --strong that is the batch of all GPUs together.

The learning rate is 0. A step takes as long as on its slowest rank; figures are medians. `exposed` is the time of a
step in which a rank communicates and computes nothing, from a trace; `idle` is the time without any kernel. `start` is
the time from the start of the processes to the end of the first step. All rows share the import of libraries, which is
not part of it.

A row that fails says why. scaling.json, scaling.md and scaling.png are written after every row.
"""

import argparse
import dataclasses
import os
import time
from typing import Any

import torch

from data.command_line import whole_number
from parallel.launch import choose_accelerator, local_device
from parallel.layout import Layout, parse_layout
from parallel.local_ranks import RankError, fork_server, run_ranks
from train.benchmark import report as benchmark_report
from train.benchmark.contender import (
    as_architecture,
    dataset,
    engine_contender,
    peer_contender,
    vocabulary_of,
)
from train.benchmark.measure import (
    Figures,
    measure_kernels,
    measure_times,
    memory_measured,
    over_ranks,
    speed,
    warmed_up,
)
from train.benchmark.scaling_report import as_table, plot, row_line
from train.compare.layouts import apply_layout
from train.config import Config, ConfigError, dataset_faults, load_config, world_faults
from train.start import timeline

OURS = "ours"
PEER = "GPT-2"
ONE = "one"
PEERS = ("DDP", "FSDP2", "TP")
"""Forms of train.benchmark.peer over several ranks."""
WARM_UP_STEPS = 3
PRELOADED = "train.benchmark.preload"


@dataclasses.dataclass(frozen=True)
class Run:
    """One row before it is measured.

    Attributes:
        program: OURS or PEER.
        form: a layout, or a form of the peer.
        config: with sizes, batch and layout.
    """

    program: str
    form: str
    ranks: int
    config: Config


@dataclasses.dataclass
class Measured:
    """What one rank of a run answers."""

    figures: Figures
    start_s: dict[str, float]
    machine: dict[str, str]


def main(argv: list[str]) -> int:
    """Measure every row; return 1 if one of them failed."""
    options = parse(argv)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that asking for a GPU leaves the server forkable
    choose_accelerator()
    gpus = options.gpus or torch.cuda.device_count() or 2
    config = load_config(options.config, options.overrides)
    manifest = dataset(config)
    runs = planned(config, gpus, options)
    faults = [] if manifest is None else [fault for run in runs for fault in dataset_faults(run.config, manifest)]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    benchmark_report.make_folder(options.output)
    began = time.monotonic()
    context = server_of_ranks()
    report: dict[str, Any] = {
        "import_s": time.monotonic() - began,
        "config": config.record(),
        "strong": options.strong,
        "vocab_size": vocabulary_of(config, manifest),
        "rows": [],
    }
    print(f"libraries imported in {report['import_s']:.1f} s, once for all rows", flush=True)
    for number, run in enumerate(runs, 1):
        row = measured(run, report, options, context)
        report["rows"].append(row)
        print(f"{number}/{len(runs)}  {row_line(row)}  ({time.monotonic() - began:.0f} s so far)", flush=True)
        benchmark_report.write(options.output, "scaling", report, as_table(report), show=number == len(runs))
        plot(report["rows"], options.output / "scaling.png")
    return int(any("failed" in row for row in report["rows"]))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark_report.add_arguments(parser, "runs/scaling", "configs/ereg_1b.json")
    parser.add_argument(
        "--gpus", type=whole_number(1), metavar="N", help="GPUs of the layouts (default: all, or 2 CPU processes)"
    )
    parser.add_argument(
        "--layouts",
        nargs="*",
        metavar="LAYOUT",
        help="written as for parallel.compare, such as tp=2:sp=1; acc is the number of micro-batches, and without it "
        "micro-batches have their configured size (default: every axis over all GPUs, and ZeRO 1 to 3)",
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; none if nothing follows"
    )
    parser.add_argument(
        "--peer-micro-batch-size",
        type=whole_number(1),
        metavar="B",
        help="sequences of a peer's micro-batch (default: half of training.micro_batch_size, since it needs more "
        "memory)",
    )
    parser.add_argument("--strong", action="store_true", help="the global batch is the same for any number of GPUs")
    parser.add_argument("--steps", type=whole_number(1), default=6, help="timed steps of a row (default: %(default)s)")
    parser.add_argument(
        "--time-limit",
        type=whole_number(1),
        default=120,
        metavar="S",
        help="seconds until a row is given up (default: %(default)s)",
    )
    return parser.parse_intermixed_args(argv)


def planned(config: Config, gpus: int, options: argparse.Namespace) -> list[Run]:
    """Return the rows in the order in which they are measured.

    Raises:
        ConfigError: a layout that was asked for does not fit. Those of the default list are left out with a line.
    """
    runs = [run_of(config, Layout(), options.strong)]
    layouts = default_layouts(gpus) if options.layouts is None else options.layouts
    for text in layouts:
        try:
            layout = parse_layout(text)
            if layout.world_size > gpus:
                raise ConfigError([f"layout {text} needs {layout.world_size} GPUs, and there are {gpus}"])
            runs.append(run_of(config, layout, options.strong))
        except ValueError as error:
            if options.layouts is not None:
                raise ConfigError(str(error).splitlines()) from None
            print(f"left out: {error}")
    size = options.peer_micro_batch_size or max(1, config.training.micro_batch_size // 2)
    if options.peers:
        runs += [peer_run(config, form, gpus, size, options.strong) for form in (ONE, *options.peers)]
    return runs


def default_layouts(gpus: int) -> list[str]:
    """Return every axis over all GPUs; a pipeline has four micro-batches a stage."""
    if gpus == 1:
        return []
    return [
        f"dp={gpus}",
        f"dp={gpus}:zero=2",
        f"dp={gpus}:zero=3",
        f"tp={gpus}:sp=1",
        f"tp={gpus}",
        f"pp={gpus}:acc={4 * gpus}",
        f"cp={gpus}",
    ]


def run_of(config: Config, layout: Layout, strong: bool) -> Run:
    """Return a row of this project's engine under a layout.

    Raises:
        ConfigError: the sizes do not fit together.
    """
    batched = with_batch(config, layout.world_size, config.training.micro_batch_size, strong)
    training = batched.training
    acc = layout.acc or max(1, training.global_batch_size // (training.micro_batch_size * layout.dp))
    applied = apply_layout(batched, dataclasses.replace(layout, acc=acc), Layout(), as_configured=True)
    return Run(OURS, str(layout) if layout.world_size > 1 else ONE, layout.world_size, applied)


def peer_run(config: Config, form: str, gpus: int, micro_batch_size: int, strong: bool) -> Run:
    """Return a row of the peer.

    Raises:
        ConfigError: the batch cannot be divided.
    """
    ranks = 1 if form == ONE else gpus
    own = as_architecture(with_batch(config, ranks, micro_batch_size, strong), "SM+LN+G")
    single = dataclasses.replace(own, parallel=type(own.parallel)())
    if faults := world_faults(single, 1 if form == "TP" else ranks):
        raise ConfigError([f"peer {form}: {fault}; see --peer-micro-batch-size" for fault in faults])
    return Run(PEER, form, ranks, single)


def with_batch(config: Config, ranks: int, micro_batch_size: int, strong: bool) -> Config:
    """Return the configuration with the batch of so many GPUs."""
    batch = config.training.global_batch_size * (1 if strong else ranks)
    training = dataclasses.replace(config.training, global_batch_size=batch, micro_batch_size=micro_batch_size)
    return dataclasses.replace(config, training=training)


def measured(run: Run, report: dict[str, Any], options: argparse.Namespace, context: Any) -> dict[str, Any]:
    """Measure one row; enter the machine in the report when it is first known."""
    training = run.config.training
    row: dict[str, Any] = {
        "program": run.program,
        "form": run.form,
        "ranks": run.ranks,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
    }
    try:
        ranks: list[Measured] = run_ranks(
            time_on_this_rank,
            run.ranks,
            run,
            options.steps,
            use_gpu=torch.cuda.is_available(),
            time_limit_s=options.time_limit,
            context=context,
        )
    except RankError as error:
        return {**row, "failed": reason(str(error))}
    report.setdefault("machine", ranks[0].machine)
    figures = over_ranks([each.figures for each in ranks])
    start_s = {name: max(each.start_s.get(name, 0.0) for each in ranks) for name in ranks[0].start_s}
    row |= speed(figures, run.config, report["vocab_size"], run.ranks, report["machine"]["device"])
    return {
        **row,
        "efficiency": efficiency(row, report["rows"]),
        "start_s": sum(start_s.values()),
        "start_by_phase_s": start_s,
        **dataclasses.asdict(dataclasses.replace(figures, kernels=figures.kernels[:40])),
    }


def server_of_ranks() -> Any:
    """Start a server that imports all libraries, and return its context; None if its ranks could not use a GPU."""
    context = fork_server(PRELOADED)
    try:
        run_ranks(touch_device, 1, context=context)
    except RankError as error:
        print(f"every row imports the libraries anew: {reason(str(error))}", flush=True)
        return None
    return context


def touch_device() -> None:
    """Use this rank's device, which fails where importing has already done so."""
    torch.zeros(1, device=local_device())


def efficiency(row: dict[str, Any], earlier: list[dict[str, Any]]) -> float | None:
    """Return a row's tokens/s/GPU over those of the same program on one GPU; None if that row failed."""
    for base in (*earlier, row):
        if base["ranks"] == 1 and base["program"] == row["program"] and "failed" not in base:
            return float(row["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"])
    return None


def reason(text: str) -> str:
    """Return the line of a RankError that says why: the first exception, or that no rank answered."""
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "rank ", "Traceback"))]
    memory = [line for line in lines if "OutOfMemoryError" in line]
    return (memory or lines or text.splitlines())[0][:200]


def time_on_this_rank(run: Run, steps: int) -> Measured:
    """Build the run's contender, and measure it."""
    timeline.begin(show=False)
    if run.program != OURS:
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # which serves our engine; PyTorch's own does not set it
    manifest = dataset(run.config, say=lambda _: None)
    vocab_size = vocabulary_of(run.config, manifest)
    if run.program == OURS:
        contender, _ = engine_contender(run.program, run.config, vocab_size, manifest)
    else:
        contender = peer_contender(run.program, run.config, vocab_size, manifest, run.form)
    with timeline.phase("first_step"), timeline.compiling():
        figures = warmed_up(contender, 1)
    start_s = timeline.finish()
    figures.losses += warmed_up(contender, WARM_UP_STEPS - 1).losses
    with memory_measured(figures):
        measure_times(contender, figures, steps)
    measure_kernels(contender, figures)
    return Measured(figures, start_s, benchmark_report.machine())
