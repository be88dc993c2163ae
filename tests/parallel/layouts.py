"""Trains a tiny model under a layout on gloo ranks, and gives back everything that layouts must agree on."""

import dataclasses
from typing import Any

import torch

from model.config import ModelConfig
from model.regularizer import RegularizerConfig
from parallel.config import ParallelConfig
from tests.ranks import run_ranks

VOCAB_SIZE = 101  # tensor-parallel sizes do not divide it
GLOBAL_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    num_micro_batches: int = 2
    recompute: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        flags = ("-sp" if self.sequence_parallel else "") + ("-recompute" if self.recompute else "")
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}-zero{self.zero_stage}-acc{self.num_micro_batches}{flags}"


@dataclasses.dataclass
class Outcome:
    """Per step (cross-entropy, entropy loss, gradient norm); then the whole state under global names, and all
    entropies.
    """

    steps: torch.Tensor
    tensors: dict[str, torch.Tensor]
    entropy_LN: torch.Tensor


def model_config(**changes: Any) -> ModelConfig:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    return ModelConfig(**{**sizes, **changes}).resolved()


def outcome(
    layout: Layout, model: ModelConfig, steps: int, granularity: str = "per_query", clipping: float = 0.5
) -> Outcome:
    """Trains `steps` steps on seeded random tokens; the same for every layout with equal micro-batch size times dp."""
    from parallel.state import SavedState

    answers = run_ranks(train, layout.world_size, layout, model, steps, granularity, clipping)
    saved = SavedState([state for _, _, state in answers])
    tensors = {
        f"{kind} {name}": saved.whole(name, kind)[:VOCAB_SIZE]
        for name in saved.pieces
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    return Outcome(answers[0][0], tensors, answers[0][1])


def train(layout: Layout, model: ModelConfig, steps: int, granularity: str, clipping: float) -> tuple[Any, Any, Any]:
    from parallel.telemetry import head_snapshot, loss_parts, sum_over_ranks

    engine = build(layout, model, granularity, clipping)
    generator = torch.Generator().manual_seed(7)
    rows = []
    for step in range(steps):
        batch = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH, model.seq_length + 1), generator=generator)
        statistics = engine.train_step(micro_batches(engine, layout, batch), 1e-2 * (step + 1) / steps)
        losses = sum_over_ranks(loss_parts(statistics, engine.groups))
        rows.append([*losses.tolist(), float(engine.gradient_norm)])
    heads = head_snapshot(engine.stage, statistics, engine.groups)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(heads.entropy_nats), engine.state_dict()


def build(layout: Layout, model: ModelConfig, granularity: str, clipping: float) -> Any:
    from parallel.engine import Engine, EngineConfig
    from parallel.grid import RankGrid
    from parallel.launch import initialize_distributed, local_device, rank
    from parallel.megatron import initialize_groups
    from parallel.regularizer import ShardedRegularizer
    from parallel.stage import Stage, build_transformer, recompute_activations

    initialize_distributed(timeout_s=120)
    parallel = ParallelConfig(layout.tp, layout.pp, layout.sequence_parallel, layout.zero_stage)  # type: ignore[arg-type]
    groups = initialize_groups(RankGrid(layout.tp, layout.pp, layout.dp, rank()))
    transformer = build_transformer(model, parallel, groups, vocab_size=VOCAB_SIZE, seed=3, device=local_device())
    if layout.recompute:
        recompute_activations(transformer)
    regularizer = None
    if model.regularized:
        regularizer = ShardedRegularizer(
            RegularizerConfig(coefficient=1.0, margin=0.05, granularity=granularity),  # type: ignore[arg-type]
            groups,
            num_layers=model.num_layers,
            num_heads=model.num_attention_heads,
            seq_length=model.seq_length,
            num_micro_batches=layout.num_micro_batches,
        )
    engine_config = EngineConfig(
        parallel=parallel,
        micro_batch_size=GLOBAL_BATCH // (layout.num_micro_batches * layout.dp),
        num_micro_batches=layout.num_micro_batches,
        bf16=False,
        gradient_clipping=clipping,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        epsilon=1e-4,  # tames Adam's division where a gradient is only rounding noise
        deepspeed={},
    )
    return Engine(Stage(transformer, regularizer), groups, engine_config)


def micro_batches(engine: Any, layout: Layout, batch: torch.Tensor) -> Any:
    size = GLOBAL_BATCH // (layout.num_micro_batches * layout.dp)
    for index in range(layout.num_micro_batches):
        start = (index * layout.dp + engine.groups.grid.dp_rank) * size
        rows = batch[start : start + size].t()
        yield rows[:-1].contiguous(), rows[1:].contiguous()
