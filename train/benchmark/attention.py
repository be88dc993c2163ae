"""Measure time and memory of attention with entropies, forward and backward, against other implementations.

The contenders of a shape are timed in turn, for several rounds, so that clock drift affects all alike. Figures are
medians. Contenders without an entropy are marked. Writes attention.json, attention.md and attention.png.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.command_line import path_argument, whole_number
from model.entropy_attention import entropy_attention
from train.benchmark import report as benchmark_report

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
GPU_SHAPES = "128,512,12,64 512,128,12,64 1024,64,12,64 2048,16,16,128 4096,8,16,128 8192,4,16,128"
OVERWRITES = 16  # of 256 MiB each, about a millisecond
CPU_SHAPES = "128,16,4,32 2048,1,4,32"


def main(argv: list[str]) -> int:
    """Run the benchmark, write its files and print the table."""
    arguments = parse(argv)
    benchmark_report.make_folder(arguments.output)
    torch.manual_seed(0)
    results = []
    for shape in arguments.shapes:
        results += measure_shape(shape, arguments)
    report = {"machine": benchmark_report.machine(), "arguments": printable(arguments), "results": results}
    benchmark_report.write(arguments.output, "attention", report, as_table(report))
    plot(results, arguments.output / "attention.png")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device, help="default: %(default)s")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=[shape_of(s) for s in (GPU_SHAPES if device == "cuda" else CPU_SHAPES).split()],
        metavar="T,B,N,H",
        help="tokens, sequences, heads and head width of each shape (default: a range that suits the device)",
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--tokens-first", action="store_true", help="lay tensors out as [T, B, N, H], as the model does"
    )
    parser.add_argument(
        "--temperature",
        choices=["none", "per_head", "per_position"],
        default="none",
        help="learned softmax temperature of our kernel",
    )
    names = sorted(contenders("none", 1, 1))
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"contenders to run (default: all): {'; '.join(names)}"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="rounds of timing (default: %(default)s)")
    parser.add_argument(
        "--output", type=path_argument, default=Path("runs/benchmark"), metavar="DIR", help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    arguments.dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    return arguments


def shape_of(text: str) -> tuple[int, int, int, int]:
    """Parse "T,B,N,H"."""
    try:
        tokens, batch, heads, width = map(whole_number(1), text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected four whole numbers T,B,N,H from 1, such as 128,512,12,64"
        ) from None
    return tokens, batch, heads, width


def contenders(temperature: str, heads: int, tokens: int, device: str = "cpu") -> dict[str, Attend]:
    """Return the contenders by name. Only ours has a temperature, so that its cost shows."""
    t = None
    if temperature != "none":
        t = torch.full(
            (heads,) if temperature == "per_head" else (heads, tokens), 1.5, device=device, requires_grad=True
        )
    return {
        "ours": partial(entropy_attention, temperature=t),
        "ours, entropy off": partial(entropy_attention, temperature=t, return_entropy=False),
        "SDPA flash (no entropy)": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN (no entropy)": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "FlexAttention, [V, K]": FlexEntropy(),
        "materialized": materialized,
        "materialized, compiled": torch.compile(materialized, dynamic=False),
    }


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """Run PyTorch's attention through one backend; it gives no entropies."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), None


def materialized(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention as published: the whole matrix of probabilities, and its entropy through a logarithm."""
    s = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    tokens = q.shape[2]
    s = s.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    p = s.softmax(-1)
    return p.to(v.dtype) @ v, -(p * (p + 1e-9).log()).sum(-1)


class FlexEntropy:
    """FlexAttention with keys appended to the values. sum_j p_j k_j gives the mean score, and H = lse - mean."""

    def __init__(self) -> None:
        self.compiled: Any = None
        self.masks: dict[int, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.compiled = self.compiled or torch.compile(flex_attention, dynamic=False)
        tokens, width = q.shape[2:]
        if tokens not in self.masks:
            self.masks[tokens] = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=q.device.type
            )
        both, lse = self.compiled(q, k, torch.cat([v, k], -1), block_mask=self.masks[tokens], return_lse=True)
        mean = (q.float() * both[..., width:].float()).sum(-1) / math.sqrt(width)
        return both[..., :width], lse - mean


def measure_shape(shape: tuple[int, int, int, int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record per contender. A contender that cannot run here has a reason in place of figures."""
    torch._dynamo.reset()  # beyond eight shapes it would stop compiling
    tokens, batch, heads, width = shape
    make = partial(make_tensor, shape, arguments)
    inputs, grad_output = [make() for _ in range(3)], make().detach()
    grad_entropy = torch.randn(batch, heads, tokens, device=arguments.device) / tokens
    records: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, attend in contenders(arguments.temperature, heads, tokens, arguments.device).items():
        if arguments.only and name not in arguments.only:
            continue
        record: dict[str, Any] = {"tokens": tokens, "batch": batch, "heads": heads, "width": width, "name": name}
        records[name] = record
        pair = (partial(forward, attend, inputs), partial(both_ways, attend, inputs, grad_output, grad_entropy))
        try:
            pair[1]()
            record["peak_memory_gib"] = peak_memory_gib(pair[1], arguments.device)
            calls[name] = pair
        except (RuntimeError, ImportError, NotImplementedError) as error:
            record["not_run"] = str(error).strip().splitlines()[0][:120]
    samples: dict[tuple[str, int], list[float]] = {(name, i): [] for name in calls for i in range(2)}
    for _ in range(arguments.rounds):
        for (name, i), times in samples.items():
            times += times_ms(calls[name][i], arguments.device)
    for (name, i), times in samples.items():
        records[name][("forward_ms", "forward_backward_ms")[i]] = statistics.median(times)
    return list(records.values())


def make_tensor(shape: tuple[int, int, int, int], arguments: argparse.Namespace) -> Tensor:
    """Return random queries, keys or values [B, N, T, H], in the memory order that was asked for."""
    tokens, batch, heads, width = shape
    options: dict[str, Any] = {"device": arguments.device, "dtype": arguments.dtype}
    if arguments.tokens_first:
        return torch.randn(tokens, batch, heads, width, **options).permute(1, 2, 0, 3).requires_grad_()
    return torch.randn(batch, heads, tokens, width, **options).requires_grad_()


def forward(attend: Attend, inputs: list[Tensor]) -> None:
    """Run attention forward only."""
    with torch.no_grad():
        attend(*inputs)


def both_ways(attend: Attend, inputs: list[Tensor], grad_output: Tensor, grad_entropy: Tensor) -> None:
    """Run attention forward and backward."""
    output, entropy = attend(*inputs)
    results, gradients = (output,), (grad_output,)
    if entropy is not None:
        results, gradients = (output, entropy), (grad_output, grad_entropy)  # type: ignore[assignment]
    torch.autograd.grad(results, inputs, gradients)


def times_ms(call: Callable[[], Any], device: str) -> list[float]:
    """Time a few calls, in milliseconds, after one warm-up call.

    On a GPU, events take the time. The cache is overwritten before each call, which also gives the host time to launch
    it.
    """
    call()
    if device == "cpu":
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]
    overwritten = torch.empty(2**26, dtype=torch.int32, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
    for start_event, end_event in events:
        for _ in range(OVERWRITES):
            overwritten.zero_()
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]


def peak_memory_gib(call: Callable[[], Any], device: str) -> float | None:
    """Return the peak GiB that a call allocates beyond what was allocated before; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def printable(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON can hold them."""
    return {name: value if isinstance(value, bool | int) else str(value) for name, value in vars(arguments).items()}


def as_table(report: dict[str, Any]) -> str:
    """Format the results as Markdown, one row per contender and shape."""
    lines = [
        f"{report['machine']['device']}, torch {report['machine']['torch']}, {report['machine']['date']}, "
        f"commit {report['machine']['commit']}, {report['arguments']['dtype']}, causal; medians",
        "",
        "| T, B, N, H | attention | forward ms | forward + backward ms | memory GiB |",
        "|---|---|--:|--:|--:|",
    ]
    for r in report["results"]:
        shape = f"{r['tokens']}, {r['batch']}, {r['heads']}, {r['width']}"
        if "not_run" in r:
            lines.append(f"| {shape} | {r['name']} | not run: {r['not_run']} | | |")
            continue
        memory = "" if r["peak_memory_gib"] is None else f"{r['peak_memory_gib']:.2f}"
        lines.append(f"| {shape} | {r['name']} | {r['forward_ms']:.3f} | {r['forward_backward_ms']:.3f} | {memory} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draw the time of forward plus backward as bars, grouped by shape, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["tokens"], r["batch"], r["heads"], r["width"]) for r in results))
    names = list(dict.fromkeys(r["name"] for r in results))
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    for i, name in enumerate(names):
        found: dict[int, float] = {
            shapes.index((r["tokens"], r["batch"], r["heads"], r["width"])): r["forward_backward_ms"]
            for r in results
            if r["name"] == name and "forward_backward_ms" in r
        }
        axes.bar(
            [x + (i - len(names) / 2) * 0.8 / len(names) for x in found],
            list(found.values()),
            0.8 / len(names),
            label=name,
        )
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, ms")
    axes.set_xticks(range(len(shapes)), [f"T={t}\nB={b} N={n} H={h}" for t, b, n, h in shapes])
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(file, dpi=150)
