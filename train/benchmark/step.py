"""Measure tokens per second and memory of a training step, against a GPT-2 of equal size and variants.

Every contender is built as training builds it and warmed up. All are then timed in turn, for several rounds, so that
clock drift affects all alike. Figures are medians. Memory is what PyTorch reserves on the device at the peak of a step,
CUDA graphs included, without what the other contenders hold.

The learning rate is 0. The work is the same, and no contender can diverge and have its steps skipped. If data.path is a
dataset, samples are read from it as in training; otherwise tokens are random, and a line says so. Writes step.json,
step.md and step.png.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.command_line import path_argument, whole_number
from data.errors import DataError
from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset_once
from model.config import ModelConfig
from train.benchmark import report as benchmark_report
from train.benchmark.timing import (
    MATMUL_SIZE,
    count_device_waits,
    host_time,
    kernel_times,
    matmul_tflops,
    reserved_bytes,
    timed,
)
from train.config import Config, ConfigError, config_from_dict, dataset_faults, load_config, world_faults
from train.cost.flops import mfu, training_flops_per_token

if TYPE_CHECKING:
    from parallel.micro_batch import MicroBatch

CONTENDERS = {
    "ours": "the configuration's model through this project's engine",
    "unregularized": "the same without the entropy regularizer",
    "SM+LN+G": "LayerNorm and GELU through this project's engine",
    "GPT-2": "LayerNorm and GELU in plain compiled PyTorch",
}
WARM_UP_STEPS = 4


def main(argv: list[str]) -> int:
    """Run the benchmark, write its files and print the table."""
    options = parse(argv)
    from parallel.launch import choose_accelerator

    choose_accelerator()
    torch._dynamo.config.automatic_dynamic_shapes = False  # compile each micro-batch size separately
    config = load_config(options.config, options.overrides)
    manifest = dataset(config)
    contenders = variants(config, options)
    faults = world_faults(contenders[0][1], 1) if contenders else ["nothing to time: GPT-2 does not recompute"]
    faults += [] if manifest is None else dataset_faults(config, manifest)
    if faults:
        raise ConfigError(faults)
    benchmark_report.make_folder(options.output)
    rate, sustained = matmul_tflops() if torch.cuda.is_available() else (None, None)
    results = [described(contender, rate) for contender in measure(build(contenders, manifest), options)]
    report = {
        "machine": benchmark_report.machine(),
        "config": config.record(),
        "matmul_tflops": rate,
        "sustained_matmul_tflops": sustained,
        "results": results,
    }
    benchmark_report.write(options.output, "step", report, as_table(report))
    plot(results, options.output / "step.png")
    import torch.distributed as dist

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
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON configuration, for instance configs/ereg.json"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
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
    parser.add_argument(
        "--output", type=path_argument, default=Path("runs/benchmark"), metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_intermixed_args(argv)
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile needs a GPU, and there is none; leave it out")
    return options


@dataclasses.dataclass
class Contender:
    """A step to time, and its results."""

    name: str
    model: ModelConfig
    vocab_size: int
    micro_batch_size: int
    recompute: str
    step: Callable[[], torch.Tensor]  # whether it was accepted, on the device
    reserved_before: int  # bytes
    step_times_s: list[float] = dataclasses.field(default_factory=list)
    peak_memory_gib: float | None = None
    device_waits: int | None = None
    host_time_s: float | None = None
    kernels: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.micro_batch_size * self.model.seq_length


def build(contenders: list[tuple[str, Config]], manifest: Manifest | None) -> Iterator[Contender]:
    """Build the contenders one after the other, so that each can be warmed up before the next is built."""
    from parallel.config import padded_vocab_size
    from parallel.launch import local_device
    from train.parts import build_engine

    groups = None
    for name, own in contenders:
        vocab_size = own.data.planned_vocab_size or 32000 if manifest is None else manifest.vocab_size
        before = reserved_bytes()
        if name == "GPT-2":
            from train.benchmark.peer import Peer

            peer = Peer(own, padded_vocab_size(vocab_size, 1), local_device())
            run: Callable[..., Any] = peer_step(peer)
        else:
            engine = build_engine(own, vocab_size, groups)
            groups = engine.groups
            run = engine_step(engine)
        batches = open_batches(own, vocab_size, from_dataset=manifest is not None)
        size, recompute = own.training.micro_batch_size, own.training.activation_recompute
        yield Contender(name, own.model, vocab_size, size, recompute, step_of(run, batches), before)


def variants(config: Config, options: argparse.Namespace) -> list[tuple[str, Config]]:
    """Return name and configuration of each contender. GPT-2 runs without recomputation only."""
    sizes = options.micro_batch_sizes or [config.training.micro_batch_size]
    recomputes = options.recompute or [config.training.activation_recompute]
    return [
        (name, variant(config, name, size, recompute))
        for name, recompute, size in product(options.contenders, recomputes, sizes)
        if name != "GPT-2" or recompute == "none"
    ]


def variant(config: Config, name: str, micro_batch_size: int, recompute: str) -> Config:
    """Return the configuration of one contender, with one micro-batch per step."""
    tree = config.as_dict()
    tree["training"] |= {
        "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size,
        "activation_recompute": recompute,
    }
    own = {key: tree["model"][key] for key in SIZES}
    if name == "unregularized":
        tree["model"]["regularized"] = False
    elif name in ("SM+LN+G", "GPT-2"):
        tree["model"] = {**own, "architecture": "SM+LN+G"}
    return config_from_dict(tree)


SIZES = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


def engine_step(engine: Any) -> Callable[..., Any]:
    """Return a call that trains one step with our engine at a learning rate of 0."""
    return lambda batches: engine.train_step(batches, learning_rate=0.0)[0].accepted


def peer_step(peer: Any) -> Callable[..., Any]:
    """Return a call that trains one step of the plain PyTorch peer."""
    return lambda batches: peer.train_step(*next(batches).tensors).isfinite()


def step_of(run: Callable[..., torch.Tensor], batches: Iterator[Any]) -> Callable[[], torch.Tensor]:
    """Return a call without arguments that trains one step on the next batches."""
    return lambda: run(batches)


def dataset(config: Config) -> Manifest | None:
    """Open the dataset. Print a line and return None if it cannot be read."""
    try:
        return open_dataset_once(config.data.path, config.data.read_options())
    except DataError as error:
        print(f"random tokens: no dataset at data.path = {config.data.path} ({error})")
        return None


def open_batches(config: Config, vocab_size: int, from_dataset: bool) -> Iterator["MicroBatch"]:
    """Yield micro-batches on the device without end, from the dataset or of random tokens."""
    from parallel.launch import local_device
    from parallel.micro_batch import micro_batch, to_device
    from train.parts import micro_batches, open_stream

    grid = config.grid(1)
    if from_dataset:
        yield from micro_batches(open_stream(config, grid, "train"), grid, local_device())
    while True:
        rows_BT = torch.randint(vocab_size, (config.training.micro_batch_size, config.model.seq_length + 1))
        yield micro_batch(to_device(rows_BT, local_device()), range(config.model.seq_length))


def measure(contenders: Iterator[Contender], options: argparse.Namespace) -> list[Contender]:
    """Warm up each contender and measure its memory and its waits for the device, then time all in turn."""
    ready = []
    for contender in contenders:
        for _ in range(WARM_UP_STEPS):
            accepted = contender.step()
        if not accepted:
            raise SystemExit(
                f"{contender.name}: loss or gradients are not finite; it cannot be timed as a training step"
            )
        measure_memory(contender)
        contender.device_waits = count_device_waits(contender.step)
        contender.host_time_s = host_time(contender.step)
        if options.profile:
            contender.kernels = kernel_times(contender.step)
        ready.append(contender)
        print(f"ready: {contender.name}, micro-batch {contender.micro_batch_size}, recompute {contender.recompute}")
    for _ in range(options.rounds):
        for contender in ready:
            contender.step_times_s += timed(contender.step, options.steps)
    return ready


def measure_memory(contender: Contender) -> None:
    """Measure what a contender and its steps reserve on the device, after freeing unused cached blocks."""
    if not torch.cuda.is_available():
        return
    reserved_bytes()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        contender.step()
    contender.peak_memory_gib = (torch.cuda.max_memory_reserved() - contender.reserved_before) / 2**30


def described(contender: Contender, rate: float | None) -> dict[str, Any]:
    """Return all figures of a contender.

    Args:
        rate: TFLOP/s of a large matrix product on this device, None on a CPU.
    """
    step_time_s = statistics.median(contender.step_times_s)
    tokens_per_second = contender.tokens / step_time_s
    flops = training_flops_per_token(contender.model, contender.vocab_size)
    name = torch.cuda.get_device_name() if rate else ""
    return {
        "name": contender.name,
        "architecture": contender.model.architecture,
        "seq_length": contender.model.seq_length,
        "micro_batch_size": contender.micro_batch_size,
        "recompute": contender.recompute,
        "step_time_s": step_time_s,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops,
        "tflops": tokens_per_second * flops / 1e12,
        "share_of_matmul": tokens_per_second * flops / 1e12 / rate if rate else None,
        "mfu": mfu(tokens_per_second, flops, name, 1) if rate else None,
        "peak_memory_gib": contender.peak_memory_gib,
        "device_waits": contender.device_waits,
        "host_time_s": contender.host_time_s,
        "kernels_ms": contender.kernels,
        "step_times_s": contender.step_times_s,
    }


def as_table(report: dict[str, Any]) -> str:
    """Format the results as Markdown, one row per contender. MFU = tokens/s * FLOPs per token / dense bf16 peak."""
    results = report["results"]
    peers = {r["micro_batch_size"]: r["tokens_per_second"] for r in results if r["name"] == "GPT-2"}
    machine = report["machine"]
    lines = [f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}; medians"]
    if report["matmul_tflops"]:
        lines[0] += (
            f"; bf16 product of {MATMUL_SIZE}^3: {report['matmul_tflops']:.0f} TFLOP/s, "
            f"{report['sustained_matmul_tflops']:.0f} once warm"
        )
    lines += [
        "",
        "| contender | T | micro-batch | recompute | ms a step | tokens/s | x GPT-2 | TFLOP/s | of product | MFU | "
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
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tokens_per_second'] / peer:.2f}" if peer else "",
            f"{r['tflops']:.3g}",
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(results) + 1.2), layout="constrained")
    labels = [f"{r['name']}, {r['micro_batch_size']} x {r['seq_length']}, recompute {r['recompute']}" for r in results]
    bars = axes.barh(range(len(results)), [r["tokens_per_second"] / 1e3 for r in results])
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.set_yticks(range(len(results)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("thousand tokens a second")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
