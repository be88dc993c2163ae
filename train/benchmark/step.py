"""Measure tokens per second and memory of a training step, against a GPT-2 of equal size and variants.

Under a launcher, all ranks train together in the configuration's layout:

    torchrun --nproc-per-node 2 -m train.benchmark step --config configs/ereg.json parallel.tensor_parallel_size=2

A step has one micro-batch on each replica, and four for each stage of a pipeline. Every contender is built as training
builds it and warmed up. All are then timed in turn, for several rounds, so that clock drift affects all alike. A step
takes as long as on its slowest rank; figures are medians. Memory is what PyTorch reserves on the device at the peak of
a step, CUDA graphs included, without what the other contenders hold; of several ranks, the largest.

The learning rate is 0. The work is the same, and no contender can diverge and have its steps skipped. If data.path is a
dataset, samples are read from it as in training; otherwise tokens are random, and a line says so. Rank 0 writes
step.json, step.md and step.png.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.command_line import whole_number
from data.shards.manifest import Manifest
from train.benchmark import report as benchmark_report
from train.benchmark.contender import (
    Contender,
    as_architecture,
    dataset,
    engine_contender,
    peer_contender,
    vocabulary_of,
)
from train.benchmark.measure import (
    Figures,
    measure_host,
    measure_kernels,
    measure_times,
    memory_measured,
    over_ranks,
    speed,
    warmed_up,
)
from train.benchmark.timing import MATMUL_SIZE, matmul_tflops, reserved_bytes
from train.config import Config, ConfigError, config_from_dict, dataset_faults, load_config, world_faults

CONTENDERS = {
    "ours": "the configuration's model through this project's engine",
    "unregularized": "the same without the entropy regularizer",
    "SM+LN+G": "LayerNorm and GELU through this project's engine",
    "GPT-2": "LayerNorm and GELU in plain compiled PyTorch; DistributedDataParallel over several ranks",
}
MICRO_BATCHES_A_STAGE = 4
MEMORY_STEPS = 2


def main(argv: list[str]) -> int:
    """Run the benchmark; rank 0 writes its files and prints the table."""
    options = parse(argv)
    from parallel.launch import choose_accelerator, rank, world_size

    choose_accelerator()
    say = print if rank() == 0 else _keep_silent
    torch._dynamo.config.automatic_dynamic_shapes = False  # compile each micro-batch size separately
    config = load_config(options.config, options.overrides)
    manifest = dataset(config, say)
    faults = config.parallel.world_faults(world_size())
    contenders = [] if faults else variants(config, options, world_size())
    if not faults:
        faults = (
            world_faults(contenders[0][1], world_size())
            if contenders
            else ["nothing to time: GPT-2 does not recompute"]
        )
    faults += [] if manifest is None else dataset_faults(config, manifest)
    if faults:
        raise ConfigError(faults)
    benchmark_report.make_folder(options.output)
    rate, sustained = matmul_tflops() if torch.cuda.is_available() else (None, None)
    measured = measure(build(contenders, manifest, world_size()), options, say)
    results = [described(contender, figures, world_size(), rate) for contender, figures in measured]
    if rank() == 0:
        report = {
            "machine": benchmark_report.machine(),
            "config": config.record(),
            "ranks": world_size(),
            "matmul_tflops": rate,
            "sustained_matmul_tflops": sustained,
            "results": results,
        }
        benchmark_report.write(options.output, "step", report, as_table(report))
        plot(results, options.output / "step.png")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark step",
        description=__doc__,
        epilog="contenders:\n" + "\n".join(f"  {name:<15}{meaning}" for name, meaning in CONTENDERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark_report.add_arguments(parser, "runs/benchmark", "configs/ereg.json")
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="default: all, see below"
    )
    parser.add_argument(
        "--micro-batch-sizes",
        nargs="+",
        type=whole_number(1),
        metavar="B",
        help="micro-batch sizes to time (default: the configuration's)",
    )
    parser.add_argument(
        "--recompute",
        nargs="+",
        choices=["none", "selective", "full"],
        help="values of training.activation_recompute to time (default: the configuration's)",
    )
    parser.add_argument("--steps", type=whole_number(1), default=10, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also write the time of each kernel (needs a GPU)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by DeepSpeed's launcher
    options = parser.parse_intermixed_args(argv)
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile needs a GPU, and there is none; leave it out")
    return options


def _keep_silent(_: str) -> None:
    pass


def build(
    contenders: list[tuple[str, Config]], manifest: Manifest | None, ranks: int
) -> Iterator[tuple[Contender, int]]:
    """Build the contenders one after the other, so that each can be warmed up before the next is built.

    Yields:
        The contender, and the bytes that were reserved on the device before it was built.
    """
    groups = None
    for name, own in contenders:
        before, vocab_size = reserved_bytes(), vocabulary_of(own, manifest)
        if name == "GPT-2":
            yield peer_contender(name, own, vocab_size, manifest, "whole" if ranks == 1 else "DDP"), before
        else:
            contender, groups = engine_contender(name, own, vocab_size, manifest, groups)
            yield contender, before


def variants(config: Config, options: argparse.Namespace, ranks: int) -> list[tuple[str, Config]]:
    """Return name and configuration of each contender. GPT-2 runs without recomputation only."""
    sizes = options.micro_batch_sizes or [config.training.micro_batch_size]
    recomputes = options.recompute or [config.training.activation_recompute]
    return [
        (name, variant(config, name, size, recompute, ranks))
        for name, recompute, size in product(options.contenders, recomputes, sizes)
        if name != "GPT-2" or recompute == "none"
    ]


def variant(config: Config, name: str, micro_batch_size: int, recompute: str, ranks: int = 1) -> Config:
    """Return the configuration of one contender. The peer's replicas are all ranks."""
    stages = config.parallel.pipeline_parallel_size
    replicas = ranks if name == "GPT-2" else config.data_parallel_size(ranks)
    micro_batches = MICRO_BATCHES_A_STAGE * stages if stages > 1 and name != "GPT-2" else 1
    tree = config.as_dict()
    tree["training"] |= {
        "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size * micro_batches * replicas,
        "activation_recompute": recompute,
    }
    if name == "unregularized":
        tree["model"]["regularized"] = False
    own = config_from_dict(tree)
    return as_architecture(own, "SM+LN+G") if name in ("SM+LN+G", "GPT-2") else own


def measure(
    contenders: Iterator[tuple[Contender, int]], options: argparse.Namespace, say: Any = print
) -> list[tuple[Contender, Figures]]:
    """Warm up each contender and measure its memory and its waits for the device, then time all in turn.

    Returns:
        Each contender with the figures of all ranks.
    """
    ready = []
    for contender, reserved_before in contenders:
        figures = warmed_up(contender)
        with memory_measured(figures, reserved_before):
            for _ in range(MEMORY_STEPS):
                contender.step()
        measure_host(contender, figures)
        if options.profile:
            measure_kernels(contender, figures)
        ready.append((contender, figures))
        training = contender.config.training
        size, recompute = training.micro_batch_size, training.activation_recompute
        say(f"ready: {contender.name}, micro-batch {size}, recompute {recompute}")
    for _ in range(options.rounds):
        for contender, figures in ready:
            measure_times(contender, figures, options.steps)
    return [(contender, of_all_ranks(figures)) for contender, figures in ready]


def of_all_ranks(figures: Figures) -> Figures:
    """Reduce the figures over ranks; all call and get the same."""
    if not dist.is_initialized():
        return figures
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, figures)
    return over_ranks(gathered)


def described(contender: Contender, figures: Figures, ranks: int, rate: float | None) -> dict[str, Any]:
    """Return all figures of a contender.

    Args:
        rate: TFLOP/s of a large matrix product on this device, None on a CPU.
    """
    found = speed(figures, contender.config, contender.vocab_size, ranks, torch.cuda.get_device_name() if rate else "")
    training = contender.config.training
    return {
        "name": contender.name,
        "architecture": contender.config.model.architecture,
        "seq_length": contender.config.model.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "recompute": training.activation_recompute,
        **found,
        "share_of_matmul": found["tflops_per_gpu"] / rate if rate else None,
        **dataclasses.asdict(figures),
    }


def as_table(report: dict[str, Any]) -> str:
    """Format the results as Markdown, one row per contender. MFU = tokens/s * FLOPs per token / dense bf16 peak."""
    results, ranks = report["results"], report["ranks"]
    peers = {r["micro_batch_size"]: r["tokens_per_second"] for r in results if r["name"] == "GPT-2"}
    machine = report["machine"]
    lines = [f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}; medians"]
    if ranks > 1:
        lines[0] += f"; {ranks} ranks"
    if report["matmul_tflops"]:
        lines[0] += (
            f"; bf16 product of {MATMUL_SIZE}^3: {report['matmul_tflops']:.0f} TFLOP/s, "
            f"{report['sustained_matmul_tflops']:.0f} once warm"
        )
    lines += [
        "",
        "| contender | T | micro-batch | recompute | ms a step | tokens/s/GPU | x GPT-2 | TFLOP/s | of product | MFU | "
        "GiB | waits | host ms |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        peer = peers.get(r["micro_batch_size"])
        cells = [
            r["name"],
            str(r["seq_length"]),
            str(r["micro_batch_size"]),
            r["recompute"],
            f"{1e3 * r['step_time_s']:.1f}",
            f"{r['tokens_per_second_per_gpu']:,.0f}",
            f"{r['tokens_per_second'] / peer:.2f}" if peer else "",
            f"{r['tflops_per_gpu']:.3g}",
            f"{r['share_of_matmul']:.1%}" if r["share_of_matmul"] else "",
            f"{r['mfu']:.1%}" if r["mfu"] else "",
            f"{r['peak_memory_gib']:.1f}" if r["peak_memory_gib"] else "",
            "" if r["device_waits"] is None else str(r["device_waits"]),
            "" if r["host_time_s"] is None else f"{1e3 * r['host_time_s']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draw tokens per second as bars."""
    labels = [f"{r['name']}, {r['micro_batch_size']} x {r['seq_length']}, recompute {r['recompute']}" for r in results]
    values = [r["tokens_per_second_per_gpu"] / 1e3 for r in results]
    benchmark_report.draw_bars(labels, values, "thousand tokens a second on each device", file)
