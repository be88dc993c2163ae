"""Builds the parts of a run from its configuration: process groups, stage, engine, data stream, micro-batches."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from data.stream.dataset import open_dataset_once
from data.stream.token_stream import TokenStream
from parallel.distillation import Distillation
from parallel.engine.compiled import compile_blocks
from parallel.engine.engine import Engine, EngineConfig
from parallel.grid import RankGrid
from parallel.launch import initialize_distributed, local_device
from parallel.layout import Layout
from parallel.micro_batch import MicroBatch, micro_batch, to_device
from parallel.sharding.megatron import Groups, initialize_groups
from parallel.sharding.regularizer import ShardedRegularizer
from parallel.sharding.stage import Stage, build_transformer, recompute_activations
from parallel.stages import stage_layers
from parallel.state.training_state import SavedState, load_weights
from train.config import Config
from train.start.compiled_code import key_compiled_code
from train.start.timeline import phase


def build_groups(config: Config) -> Groups:
    """Join the process group and create the groups of the grid's axes; all ranks call."""
    initialize_distributed()
    return initialize_groups(config.grid(dist.get_world_size(), dist.get_rank()))


def build_stage(
    config: Config, vocab_size: int, dtype: torch.dtype = torch.float32, groups: Groups | None = None
) -> tuple[Stage, Groups]:
    """Build this rank's part of the model with its part of the regularizer.

    Args:
        dtype: of the parameters; training needs float32.
        groups: from an earlier call in this process; None joins the process group first.
    """
    parallel, training, device = config.parallel, config.training, local_device()
    groups = groups or build_groups(config)
    layers = stage_layers(config.model, vocab_size, groups.grid.pp, training.activation_recompute)
    with phase("weights"):
        transformer = build_transformer(
            config.model,
            parallel,
            groups,
            layers=layers[groups.grid.stage],
            vocab_size=vocab_size,
            seed=training.seed,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=config.num_micro_batches(groups.grid.world_size),
            device=device,
            dtype=dtype,
        )
    recompute_activations(transformer, training.activation_recompute)
    if training.compiles(on_gpu=device.type == "cuda"):
        key_compiled_code()
        compile_blocks(transformer, config.health.verify_first_step)
    return Stage(transformer, build_regularizer(config, groups, layers[groups.grid.stage])), groups


def build_engine(
    config: Config,
    vocab_size: int,
    groups: Groups | None = None,
    initial: SavedState | None = None,
    distillation: Distillation | None = None,
) -> Engine:
    """Build this rank's stage and its optimizer.

    Args:
        groups: as in `build_stage`.
        initial: weights that replace those drawn from the seed; None keeps these.
        distillation: a teacher, or None.
    """
    stage, groups = build_stage(config, vocab_size, groups=groups)
    if initial is not None:  # before the optimizer copies and cuts them, so no layout is special
        load_weights(stage, groups, initial, vocab_size)
    stage.distillation = distillation
    return add_optimizer(stage, groups, config)


def add_optimizer(stage: Stage, groups: Groups, config: Config) -> Engine:
    """Build the engine of a stage, keeping its weights."""
    training = config.training
    engine_config = EngineConfig(
        parallel=config.parallel,
        micro_batch_size=training.micro_batch_size,
        num_micro_batches=config.num_micro_batches(groups.grid.world_size),
        bf16=training.resolved_precision(on_gpu=local_device().type == "cuda") == "bf16",
        cuda_graphs=training.cuda_graphs == "auto",
        gradient_clipping=config.optimizer.gradient_clipping,
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        epsilon=config.optimizer.epsilon,
        rate_factors={
            "threshold": config.optimizer.threshold_rate,
            "temperature_parameter": config.optimizer.temperature_rate,
        },
        deepspeed=config.deepspeed,
    )
    with phase("optimizer"):
        return Engine(stage, groups, engine_config)


def build_regularizer(config: Config, groups: Groups, layers: range) -> ShardedRegularizer | None:
    """Build the regularizer of this rank's heads and its stage's layers; None if the architecture has none."""
    if not config.model.regularized:
        return None
    return ShardedRegularizer(
        config.regularizer,
        groups,
        layers=layers,
        num_layers=config.model.num_layers,
        num_heads=config.model.num_attention_heads,
        seq_length=config.model.seq_length,
        num_micro_batches=config.num_micro_batches(groups.grid.world_size),
        device=local_device(),
    )


def layout_of(config: Config, grid: RankGrid) -> Layout:
    """Return the run's layout in the form that `parallel.compare` takes."""
    return Layout(
        tp=grid.tp,
        pp=grid.pp,
        dp=grid.dp,
        cp=grid.cp,
        sp=int(config.parallel.sequence_parallel),
        zero=config.parallel.zero_stage,
        recompute=config.training.activation_recompute,
    )


def open_stream(config: Config, grid: RankGrid, split: str, limit_samples: int | None = None) -> TokenStream:
    """Open this data-parallel rank's stream; ranks that share a replica read the same samples."""
    data = config.data
    return TokenStream(
        open_dataset_once(data.path, data.read_options()),
        split,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=grid.dp_rank,
        data_parallel_size=grid.dp,
        seed=config.training.seed,
        limit_samples=limit_samples,
        window_shards=data.shuffle_window_shards,
        prefetch=data.prefetch_micro_batches,
        within_documents=data.attention_within_documents,
        options=data.read_options(),
    )


def micro_batches(stream: TokenStream, grid: RankGrid, device: torch.device) -> Iterator[MicroBatch]:
    """Yield this rank's share of each batch of the stream, on the device."""
    for batch in stream:
        rows_BT = to_device(torch.from_numpy(batch), device)  # once, and transposed there: the host has enough to do
        starts = stream.document_starts
        document_start_BT = None if starts is None else to_device(torch.from_numpy(starts), device)
        yield micro_batch(rows_BT, grid.positions(rows_BT.shape[1] - 1), document_start_BT, stream.valid_rows)
