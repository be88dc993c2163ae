"""Predict a job's memory, traffic, step time and MFU without a GPU, and list the layouts that fit.

    python -m train.plan --config configs/ereg_1b.json --gpus 64 --gpu h100
    python -m train.plan --config configs/ereg_1b.json --gpus 64 --gpu h100 parallel.tensor_parallel_size=2

Memory and traffic are counted for bf16 training with compiled blocks. Step times follow from assumed rates, which are
printed below the plan.

Exit status: 0 if the configuration's own layout fits, 1 if not, 2 if it cannot be planned.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

from data.command_line import path_argument, print_faults, run_command, whole_number
from data.files.strict_json import to_json
from data.shards.manifest import SPLITS
from parallel.config import padded_vocab_size
from parallel.stages import stage_layers
from train.config import Config, ConfigError, dataset_faults, load_config, world_faults
from train.config.schedule import warmup_steps
from train.config.vocabulary import dataset_if_there, vocabulary
from train.cost.layouts import GIB, Plan, by_recompute, layouts, make_plan
from train.cost.links import LinksError, measured_links
from train.cost.parameters import parameter_counts
from train.cost.step_time import GPUS, Assumptions, Gpu


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        ranks = config.parallel.ranks_per_batch if options.gpus is None else options.gpus
        faults = world_faults(config, ranks)
        if faults:
            raise ConfigError(faults)
        vocab_size, source = vocabulary(config, dataset_if_there(config))
        gpu, assumed = GPUS[options.gpu], Assumptions()
        links = assumed.links(gpu)
        if options.links is not None:
            links = measured_links(options.links, links)
    except (ConfigError, LinksError) as error:
        print_faults(error)
        return 2
    plan = make_plan(config, ranks, vocab_size, gpu, links, assumed)
    others = sorted(
        (make_plan(other, ranks, vocab_size, gpu, links, assumed) for other in counted(layouts(config, ranks))),
        key=lambda other: (-other.tokens_per_second, other.peak_gib),
    )
    fitting = [other for other in others if other.fits(gpu)]
    if options.json:
        print(to_json({"plan": as_dict(plan, gpu), "layouts": [as_dict(other, gpu) for other in fitting]}))
    else:
        print_plan(plan, gpu, vocab_size, source)
        print_layouts(fitting[: options.layouts], len(others), gpu)
        print("\nAssumed:", *assumed.lines(links), sep="\n  ")
    return 0 if plan.fits(gpu) else 1


def counted(layouts: Iterator[Config]) -> Iterator[Config]:
    """Yield the layouts, and show on stderr how many there were as soon as they take more than a second."""
    started, shown = time.monotonic(), 0
    for number, layout in enumerate(layouts):
        if time.monotonic() - started > shown + 1:
            shown = int(time.monotonic() - started)
            print(f"planning: {number} layouts", file=sys.stderr)
        yield layout


def print_dry_run(config: Config, world_size: int | None) -> None:
    """Print what a training command would run: configuration, parameters, steps and ranks.

    Args:
        world_size: number of processes; None means the fewest that the layout allows.

    Raises:
        ConfigError: the sizes do not fit the world size or the dataset, or the vocabulary is unknown.
    """
    ranks = config.parallel.ranks_per_batch if world_size is None else world_size
    manifest = dataset_if_there(config)
    faults = world_faults(config, ranks) + ([] if manifest is None else dataset_faults(config, manifest))
    if faults:
        raise ConfigError(faults)
    vocab_size, source = vocabulary(config, manifest)
    grid = config.grid(ranks)
    counts = parameter_counts(config.model, vocab_size)
    if manifest is not None and (config.checkpoint.init_from or config.distillation.teacher):
        from train.initial.teacher import check_sources  # loads PyTorch's checkpoints

        check_sources(config, manifest)
    print(to_json(config.record(), indent=2))
    padded = padded_vocab_size(vocab_size, grid.tp)
    print(f"\nvocabulary        {vocab_size:,} tokens (from {source}), padded to {padded:,}")
    print(f"parameters        {sum(counts.values()):,}")
    for kind, count in counts.items():
        print(f"  {kind:<18}{count:>16,}")
    print(
        f"steps             {config.train_steps:,} ({warmup_steps(config.optimizer, config.train_steps):,} of warm-up)"
    )
    print(f"tokens            {config.train_steps * config.tokens_per_step:,} ({config.tokens_per_step:,} a step)")
    if manifest is not None:
        train, validation = (manifest.num_samples(split, config.model.seq_length) for split in SPLITS)
        epochs = config.train_steps * config.training.global_batch_size / max(train, 1)
        print(f"samples           {train:,} to train on ({epochs:.2f} epochs), {validation:,} to validate on")
    print(
        f"a step            {config.training.global_batch_size} sequences = {config.num_micro_batches(ranks)} "
        f"micro-batches of "
        f"{config.training.micro_batch_size} on {grid.dp} data-parallel ranks"
    )
    print(
        f"ranks             {ranks} = {grid.pp} stages x {grid.dp} replicas x {grid.cp} context shards x "
        f"{grid.tp} tensor shards\n"
    )
    print(grid.table(stage_layers(config.model, vocab_size, grid.pp, config.training.activation_recompute)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs (default: the fewest that the layout allows)"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="GPU model (default: h100)")
    parser.add_argument(
        "--links", type=path_argument, metavar="FILE", help="use the links that train.doctor --json measured"
    )
    parser.add_argument(
        "--layouts",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="list the N fastest layouts that fit (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    return parser.parse_intermixed_args(arguments)


def as_dict(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    """Return a plan as `--json` prints it."""
    training = plan.config.training
    return {
        "ranks": plan.ranks,
        "parallel": dataclasses.asdict(plan.config.parallel),
        "micro_batch_size": training.micro_batch_size,
        "activation_recompute": training.activation_recompute,
        "fits": plan.fits(gpu),
        "peak_memory_gib": plan.peak_gib,
        "stages_bytes": [{**vars(stage), "peak": stage.peak} for stage in plan.stages.values()],
        "sent_bytes": [vars(each) for each in plan.volumes.values()],
        "step_time_s": {**vars(plan.time), "total": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
    }


def print_plan(plan: Plan, gpu: Gpu, vocab_size: int, source: str) -> None:
    """Print the configuration's own layout in full."""
    config = plan.config
    print(
        f"{config.model.architecture}, {config.model.num_layers} layers of width {config.model.hidden_size}, T = "
        f"{config.model.seq_length}, vocabulary {vocab_size:,} ({source})\n"
        f"{plan.ranks} {gpu.name}: {layout_name(config, plan.ranks)}; {config.training.global_batch_size} sequences a "
        f"step in {config.num_micro_batches(plan.ranks)} micro-batches\n"
    )
    print("GiB a rank     weights  gradients  optimizer  activations    logits  backward      peak     parameters")
    for stage, held in plan.stages.items():
        print(
            f"stage {stage:<6d}{held.weights / GIB:10.2f}{held.gradients / GIB:11.2f}{held.optimizer / GIB:11.2f}"
            f"{held.activations / GIB:13.2f}{held.loss / GIB:10.2f}{held.backward / GIB:10.2f}{held.peak / GIB:10.2f}"
            f"{held.parameters:15,d}"
        )
    print(
        "activations by recompute: "
        + ", ".join(f"{how} {gib:.2f}" for how, gib in by_recompute(plan, vocab_size).items())
    )
    verdict = "fits" if plan.fits(gpu) else "does NOT fit"
    print(f"peak {plan.peak_gib:.1f} GiB {verdict} in {gpu.memory_gib:g} GiB\n")
    print("MB sent a step     tensor   context      data  pipeline  tied head  entropies")
    for stage, sent in plan.volumes.items():
        numbers = (sent.tensor, sent.context, sent.data, sent.pipeline)
        print(
            f"stage {stage:<8d}"
            + "".join(f"{number / 1e6:10,.0f}" for number in numbers)
            + f"{sent.embedding_ends / 1e6:11,.0f}{sent.entropy / 1e6:11,.3f}"
        )
    parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in vars(plan.time).items() if value)
    print(
        f"\nstep {1e3 * plan.time.total:.1f} ms ({parts}): {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.ranks:,.0f} a GPU, MFU {plan.mfu:.1%}, bubble "
        f"{plan.time.bubble / plan.time.total:.1%}; {config.train_steps:,} steps take "
        f"{config.train_steps * plan.time.total / 3600:,.1f} hours"
    )


def print_layouts(plans: list[Plan], tried: int, gpu: Gpu) -> None:
    """Print the layouts that fit, fastest first."""
    if not plans:
        print(f"\nnone of {tried} layouts fits: take more GPUs, or GPUs with more memory")
        return
    print(f"\nFastest of {tried} layouts that fit in {gpu.memory_gib:g} GiB:")
    print("tokens/s      MFU   peak GiB  bubble  layout")
    for plan in plans:
        print(
            f"{plan.tokens_per_second:10,.0f}  {plan.mfu:5.1%}  {plan.peak_gib:9.1f}  "
            f"{plan.time.bubble / plan.time.total:6.1%}  {layout_name(plan.config, plan.ranks)}"
        )


def layout_name(config: Config, ranks: int) -> str:
    """Name a layout by its sizes: "tp=2 pp=1 cp=1 dp=4 zero=1 sp micro_batch_size=8"."""
    parallel, training = config.parallel, config.training
    grid = config.grid(ranks)
    sizes = f"tp={grid.tp} pp={grid.pp} cp={grid.cp} dp={grid.dp} zero={parallel.zero_stage}"
    sequence = " sp" if parallel.sequence_parallel else ""
    recompute = "" if training.activation_recompute == "none" else f" recompute={training.activation_recompute}"
    return f"{sizes}{sequence} micro_batch_size={training.micro_batch_size}{recompute}"


if __name__ == "__main__":
    run_command(main)
