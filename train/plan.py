"""Plans a job on paper: memory of each stage, traffic, step time and MFU, and which layouts fit.

    python -m train.plan --config configs/ereg_1b.json --gpus 64 --gpu h100
    python -m train.plan --config configs/ereg_1b.json --gpus 64 --gpu h100 parallel.tensor_parallel_size=2

Counts are those of bf16 training with compiled blocks. Rates are assumptions, printed below the plan. Without --gpus a
plan is for the fewest ranks that the configuration's layout takes. Exit status: 0 if the configuration's own layout
fits, 1 if not, 2 if it cannot be planned.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.arguments import whole_number
from data.errors import run_command
from parallel.counting.footprint import ELEMENT_BYTES, GRADIENT_BYTES, Footprint, Workload, footprint
from parallel.counting.volume import Volume, volume
from train.config import Config, ConfigError, load_config, section_faults, world_faults
from train.cost.dry_run import dataset_if_there, vocabulary
from train.cost.flops import training_flops_per_token
from train.cost.step_time import GPUS, Assumptions, Gpu, StepTime, step_time

GIB = 2**30
OUTSIDE_ALLOCATOR_GIB = 1.5  # the CUDA context and NCCL's buffers
FRAGMENTATION = 1.08  # memory reserved for a gibibyte allocated


@dataclass(frozen=True)
class Plan:
    """One layout of a job: its stages' footprints and the slowest stage's step."""

    config: Config
    ranks: int
    stages: list[Footprint]
    volumes: list[Volume]
    time: StepTime
    tokens_per_second: float
    mfu: float

    @property
    def peak_gib(self) -> float:
        return max(stage.peak for stage in self.stages) / GIB

    def fits(self, gpu: Gpu) -> bool:
        return self.peak_gib * FRAGMENTATION + OUTSIDE_ALLOCATOR_GIB <= gpu.memory_gib


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        ranks = config.parallel.ranks_per_batch if options.gpus is None else options.gpus
        faults = world_faults(config, ranks)
        if faults:
            raise ConfigError(faults)
        vocab_size, source = vocabulary(config, dataset_if_there(config))
    except ConfigError as error:
        for line in error.faults:
            print(f"error: {line}", file=sys.stderr)
        return 2
    gpu, assumed = GPUS[options.gpu], Assumptions()
    plan = make_plan(config, ranks, vocab_size, gpu, assumed)
    others = sorted(
        (make_plan(other, ranks, vocab_size, gpu, assumed) for other in layouts(config, ranks)),
        key=lambda other: (-other.tokens_per_second, other.peak_gib),
    )
    fitting = [other for other in others if other.fits(gpu)]
    if options.json:
        print(json.dumps({"plan": as_dict(plan, gpu), "layouts": [as_dict(other, gpu) for other in fitting]}))
    else:
        print_plan(plan, gpu, vocab_size, source)
        print_layouts(fitting[: options.layouts], len(others), gpu)
        print("\nAssumed:", *assumed.lines(), sep="\n  ")
    return 0 if plan.fits(gpu) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="which GPU (default h100)")
    parser.add_argument(
        "--layouts", type=whole_number(1), default=10, metavar="N", help="layouts that fit to list (default 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of single keys")
    return parser.parse_intermixed_args(arguments)


def make_plan(config: Config, ranks: int, vocab_size: int, gpu: Gpu, assumed: Assumptions) -> Plan:
    """Plans a configuration whose sizes fit `ranks`."""
    stages = [workload(config, ranks, stage, vocab_size) for stage in kinds_of_stage(config)]
    slowest = max((step_time(stage, gpu, assumed) for stage in stages), key=lambda time: time.total)
    tokens_per_second = config.tokens_per_step / slowest.total
    flops = training_flops_per_token(config.model, vocab_size)
    return Plan(
        config,
        ranks,
        [footprint(stage) for stage in stages],
        [volume(stage, ELEMENT_BYTES, GRADIENT_BYTES) for stage in stages],
        slowest,
        tokens_per_second,
        tokens_per_second * flops / (ranks * gpu.peak_flops),
    )


def kinds_of_stage(config: Config) -> list[int]:
    """The first stage, one between and the last: the first stages have most layers and most micro-batches in flight."""
    return sorted({0, min(1, config.parallel.pipeline_parallel_size - 1), config.parallel.pipeline_parallel_size - 1})


def workload(config: Config, ranks: int, stage: int, vocab_size: int) -> Workload:
    """What a rank of one stage does."""
    per_stage = ranks // config.parallel.pipeline_parallel_size
    return Workload(
        config.model,
        config.parallel,
        config.grid(ranks, stage * per_stage),
        vocab_size,
        config.training.micro_batch_size,
        config.num_micro_batches(ranks),
        config.training.activation_recompute,
        per_head=bool(config.model.regularized) and config.regularizer.granularity == "per_head",
        cuda_graphs=config.training.cuda_graphs == "auto",
    )


def layouts(config: Config, ranks: int) -> Iterator[Config]:
    """Every layout of the ranks that the model allows, the global batch unchanged."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= ranks]
    micro_batches = [
        size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= config.training.global_batch_size
    ]
    axes = itertools.product(sizes[:4], sizes, sizes[:4], (1, 2, 3), ("none", "selective", "full"), micro_batches)
    for tp, pp, cp, zero, recompute, micro_batch_size in axes:
        parallel = dataclasses.replace(
            config.parallel,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            zero_stage=zero,  # type: ignore[arg-type]
            fused_ffn="auto",
        )
        training = dataclasses.replace(
            config.training,
            micro_batch_size=micro_batch_size,
            activation_recompute=recompute,  # type: ignore[arg-type]
        )
        layout = dataclasses.replace(config, parallel=parallel, training=training)
        if ranks % parallel.ranks_per_batch == 0 and not section_faults(layout) and not world_faults(layout, ranks):
            yield layout


def as_dict(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    """What a program wants of a plan."""
    training = plan.config.training
    return {
        "ranks": plan.ranks,
        "parallel": dataclasses.asdict(plan.config.parallel),
        "micro_batch_size": training.micro_batch_size,
        "activation_recompute": training.activation_recompute,
        "fits": plan.fits(gpu),
        "peak_memory_gib": plan.peak_gib,
        "stages_bytes": [{**vars(stage), "peak": stage.peak} for stage in plan.stages],
        "sent_bytes": [vars(each) for each in plan.volumes],
        "step_time_s": {**vars(plan.time), "total": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
    }


def print_plan(plan: Plan, gpu: Gpu, vocab_size: int, source: str) -> None:
    """The configuration's own layout in full."""
    config = plan.config
    print(
        f"{config.model.architecture}, {config.model.num_layers} layers of width {config.model.hidden_size}, T = "
        f"{config.model.seq_length}, vocabulary {vocab_size:,} ({source})\n"
        f"{plan.ranks} {gpu.name}: {layout_name(config, plan.ranks)}; {config.training.global_batch_size} sequences a "
        f"step in {config.num_micro_batches(plan.ranks)} micro-batches\n"
    )
    print("GiB a rank     weights  gradients  optimizer  activations    logits  backward      peak     parameters")
    for stage, held in zip(kinds_of_stage(config), plan.stages, strict=True):
        print(
            f"stage {stage:<6d}{held.weights / GIB:10.2f}{held.gradients / GIB:11.2f}{held.optimizer / GIB:11.2f}"
            f"{held.activations / GIB:13.2f}{held.loss / GIB:10.2f}{held.backward / GIB:10.2f}{held.peak / GIB:10.2f}"
            f"{held.parameters:15,d}"
        )
    print("activations by recompute: " + ", ".join(f"{how} {gib:.2f}" for how, gib in by_recompute(plan).items()))
    verdict = "fits" if plan.fits(gpu) else "does NOT fit"
    print(f"peak {plan.peak_gib:.1f} GiB {verdict} in {gpu.memory_gib:g} GiB\n")
    print("MB sent a step     tensor   context      data  pipeline  tied head  entropies")
    for stage, sent in zip(kinds_of_stage(config), plan.volumes, strict=True):
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


def by_recompute(plan: Plan) -> dict[str, float]:
    """GiB of kept activations of the fullest stage under each way to recompute them."""
    found = {}
    for how in ("none", "selective", "full"):
        training = dataclasses.replace(plan.config.training, activation_recompute=how)  # type: ignore[arg-type]
        config = dataclasses.replace(plan.config, training=training)
        stages = [footprint(workload(config, plan.ranks, stage, 1)) for stage in kinds_of_stage(config)]
        found[how] = max(stage.activations for stage in stages) / GIB
    return found


def print_layouts(plans: list[Plan], tried: int, gpu: Gpu) -> None:
    """Layouts that fit, fastest first."""
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
    """A layout in the words of its configuration keys."""
    parallel, training = config.parallel, config.training
    grid = config.grid(ranks)
    sizes = f"tp={grid.tp} pp={grid.pp} cp={grid.cp} dp={grid.dp} zero={parallel.zero_stage}"
    sequence = " sp" if parallel.sequence_parallel else ""
    recompute = "" if training.activation_recompute == "none" else f" recompute={training.activation_recompute}"
    return f"{sizes}{sequence} micro_batch_size={training.micro_batch_size}{recompute}"


if __name__ == "__main__":
    run_command(main)
