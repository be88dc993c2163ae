"""Measure tokens per second of generation, beside the transformers library's generation with a GPT-2 of equal size.

All contenders continue the same random prompts greedily, to the same length, with random weights and a cache of keys
and values. A measurement is a whole call: reading the prompts, then one token of each sequence at a time. They take
turns for several rounds; figures are medians. On a GPU weights are in bf16, on a CPU in float32. Neither side compiles
or captures anything. Writes generate.json, generate.md and generate.png.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.command_line import whole_number
from model.generation.decoder import generate
from model.generation.sampling import GREEDY
from model.transformer import Transformer
from train.benchmark import report as benchmark_report
from train.benchmark.contender import as_architecture, dataset, vocabulary_of
from train.config import Config, ConfigError, load_config

PEER = "GPT-2 of transformers"
CONTENDERS = {
    "ours": "the configuration's model",
    "SM+LN+G": "LayerNorm and GELU, this project's generation",
    PEER: "GPT2LMHeadModel.generate; left out if transformers is not installed",
}
NOT_INSTALLED = f"{PEER} is not timed: install it with pip install 'entropy-guided-transformer[transformers]'"

Continue = Callable[[Tensor, int], None]
"""Continues prompts [B, T] by so many tokens."""


def main(argv: list[str]) -> int:
    """Run the benchmark, write its files and print the table."""
    options = parse(argv)
    config = load_config(options.config, options.overrides)
    length = options.prompt_tokens + options.new_tokens
    if length > config.model.seq_length:
        raise ConfigError(
            [
                f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} are more than "
                f"model.seq_length = {config.model.seq_length}; choose fewer"
            ]
        )
    benchmark_report.make_folder(options.output)
    vocab_size = vocabulary_of(config, dataset(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    contenders = build(config, vocab_size, device, dtype)
    results = []
    for batch in options.batch_sizes:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(options.rounds + 1):  # the first warms up
            seed = torch.Generator().manual_seed(number)
            prompts_BT = torch.randint(vocab_size, (batch, options.prompt_tokens), generator=seed).to(device)
            for name, continue_ in contenders.items():
                seconds = timed(continue_, prompts_BT, options.new_tokens)
                times[name] += [seconds] if number else []
        for name, measured in times.items():
            seconds = statistics.median(measured)
            row = {"name": name, "batch_size": batch, "seconds": seconds, "seconds_of_rounds": measured}
            results.append({**row, "tokens_per_second": batch * options.new_tokens / seconds})
    report = {
        "machine": benchmark_report.machine(),
        "config": config.record(),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "left_out": None if PEER in contenders else NOT_INSTALLED,
        "results": results,
    }
    benchmark_report.write(options.output, "generate", report, as_table(report))
    labels = [f"{row['name']}, batch {row['batch_size']}" for row in results]
    rates = [row["tokens_per_second"] for row in results]
    benchmark_report.draw_bars(labels, rates, "generated tokens per second", options.output / "generate.png")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark generate",
        description=__doc__,
        epilog="contenders:\n" + "\n".join(f"  {name:<23}{meaning}" for name, meaning in CONTENDERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark_report.add_arguments(parser, "runs/benchmark", "configs/ereg.json")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=whole_number(1), default=[1, 8], metavar="B", help="default: 1 8"
    )
    parser.add_argument("--prompt-tokens", type=whole_number(1), default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=whole_number(1), default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="rounds of timing (default: %(default)s)")
    return parser.parse_args(argv)


def build(config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Continue]:
    """Build the contenders that can run here."""
    found = {
        "ours": ours(config, vocab_size, device, dtype),
        "SM+LN+G": ours(as_architecture(config, "SM+LN+G"), vocab_size, device, dtype),
    }
    if importlib.util.find_spec("transformers") is not None:
        found[PEER] = peer(config, vocab_size, device, dtype)
    return found


def ours(config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype) -> Continue:
    """Build this project's model and generation."""
    model = Transformer(config.model, vocab_size).to(device, dtype).eval()

    def continue_(prompts_BT: Tensor, new_tokens: int) -> None:
        assert len(list(generate(model, prompts_BT.tolist(), new_tokens, GREEDY))) == new_tokens

    return continue_


def peer(config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype) -> Continue:
    """Build a GPT-2 of the configuration's sizes in the transformers library."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = config.model
    peer_config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=sizes.seq_length,
        n_embd=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_attention_heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = GPT2LMHeadModel(peer_config).to(device, dtype).eval()

    def continue_(prompts_BT: Tensor, new_tokens: int) -> None:
        mask_BT = torch.ones_like(prompts_BT)
        found_BT = model.generate(prompts_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, do_sample=False)
        assert found_BT.shape[1] == prompts_BT.shape[1] + new_tokens

    return continue_


def timed(continue_: Continue, prompts_BT: Tensor, new_tokens: int) -> float:
    """Return the seconds of one call."""
    if prompts_BT.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    continue_(prompts_BT, new_tokens)
    if prompts_BT.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def as_table(report: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    machine, model = report["machine"], report["config"]["model"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}. "
        f"{model['num_layers']} layers of width {model['hidden_size']}, {report['dtype']}; prompts of "
        f"{report['prompt_tokens']} tokens, {report['new_tokens']} new ones.",
        "",
        "| contender | sequences | tokens/s | tokens/s of a sequence | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in report["results"]:
        rate, batch = row["tokens_per_second"], row["batch_size"]
        lines.append(f"| {row['name']} | {batch} | {rate:,.0f} | {rate / batch:,.0f} | {row['seconds']:.3f} |")
    if report["left_out"]:
        lines += ["", report["left_out"]]
    return "\n".join(lines) + "\n"
