"""Predicts what a layout of a job costs, and lists the layouts that a job could take.

Counts are those of bf16 training with compiled blocks.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from parallel.counting.footprint import ELEMENT_BYTES, GRADIENT_BYTES, Footprint, Workload, footprint
from parallel.counting.volume import Volume, volume
from parallel.stages import stage_layers
from train.config import Config, world_faults
from train.cost.flops import training_flops_per_token
from train.cost.links import Links
from train.cost.step_time import Assumptions, Gpu, StepTime, pipelined, step_time

GIB = 2**30
OUTSIDE_ALLOCATOR_GIB = 1.5  # the CUDA context and NCCL's buffers
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FRAGMENTATION = 1.08  # bytes that the allocator reserves for each byte in use


@dataclass(frozen=True)
class Plan:
    """The predicted cost of one layout.

    Attributes:
        stages: what the first stage of each kind holds, by its number.
        volumes: what it sends.
        time: of the slowest stage.
    """

    config: Config
    ranks: int
    stages: dict[int, Footprint]
    volumes: dict[int, Volume]
    time: StepTime
    tokens_per_second: float
    mfu: float

    @property
    def peak_gib(self) -> float:
        return max(stage.peak for stage in self.stages.values()) / GIB

    def fits(self, gpu: Gpu) -> bool:
        """Return whether the fullest rank fits in the GPU's memory."""
        return self.peak_gib * FRAGMENTATION + OUTSIDE_ALLOCATOR_GIB <= gpu.memory_gib


def make_plan(config: Config, ranks: int, vocab_size: int, gpu: Gpu, links: Links, assumed: Assumptions) -> Plan:
    """Predict the cost of a configuration whose sizes fit `ranks` processes."""
    kinds = kinds_of_stage(config, vocab_size)
    stages = {stage: workload(config, ranks, stage, vocab_size) for stage in kinds}
    volumes = {stage: volume(work, ELEMENT_BYTES, GRADIENT_BYTES) for stage, work in stages.items()}
    times = [(step_time(work, volumes[stage], gpu, links, assumed), kinds[stage]) for stage, work in stages.items()]
    time = pipelined(times, config.num_micro_batches(ranks))
    tokens_per_second = config.tokens_per_step / time.total
    flops = training_flops_per_token(config.model, vocab_size)
    return Plan(
        config,
        ranks,
        {stage: footprint(work) for stage, work in stages.items()},
        volumes,
        time,
        tokens_per_second,
        tokens_per_second * flops / (ranks * gpu.peak_flops),
    )


def kinds_of_stage(config: Config, vocab_size: int) -> dict[int, int]:
    """Return the first pipeline stage of each kind, and how many stages of the kind there are.

    Stages of a kind have as many layers and the same ends. Their first is the fullest: it has most micro-batches in
    flight.
    """
    pp = config.parallel.pipeline_parallel_size
    divided = stage_layers(config.model, vocab_size, pp, config.training.activation_recompute)
    kinds = [(len(layers), stage == 0, stage == pp - 1) for stage, layers in enumerate(divided)]
    return {kinds.index(kind): count for kind, count in Counter(kinds).items()}


def workload(config: Config, ranks: int, stage: int, vocab_size: int) -> Workload:
    """Return what a rank of one pipeline stage works on."""
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
    """Yield every layout of `ranks` processes that the model allows. The global batch size stays the same.

    Args:
        config: without faults; only what the axes can break is checked again.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= ranks]
    for tp, pp, cp, zero in itertools.product(sizes[:4], sizes, sizes[:4], (1, 2, 3)):
        parallel = dataclasses.replace(
            config.parallel,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            zero_stage=zero,  # type: ignore[arg-type]
            fused_ffn="auto",
        )
        if parallel.world_faults(ranks) or parallel.faults(config.model):
            continue
        for recompute, micro_batch_size in itertools.product(("none", "selective", "full"), MICRO_BATCH_SIZES):
            training = dataclasses.replace(
                config.training,
                micro_batch_size=micro_batch_size,
                activation_recompute=recompute,  # type: ignore[arg-type]
            )
            layout = dataclasses.replace(config, parallel=parallel, training=training)
            if not world_faults(layout, ranks):
                yield layout


def by_recompute(plan: Plan, vocab_size: int) -> dict[str, float]:
    """Return GiB of kept activations of the fullest stage, for each value of `training.activation_recompute`."""
    found = {}
    for how in ("none", "selective", "full"):
        training = dataclasses.replace(plan.config.training, activation_recompute=how)  # type: ignore[arg-type]
        config = dataclasses.replace(plan.config, training=training)
        stages = (workload(config, plan.ranks, stage, vocab_size) for stage in kinds_of_stage(config, vocab_size))
        found[how] = max(footprint(stage).activations for stage in stages) / GIB
    return found
