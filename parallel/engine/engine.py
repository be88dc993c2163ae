"""Training steps, evaluations and checkpoints under every layout, through DeepSpeed's engine.

With one pipeline stage this is DeepSpeed's plain engine (ZeRO 1 to 3), with more its pipeline engine (ZeRO 1).

The life of a gradient under tp=2 and ZeRO-1 in bf16, from the loss to the weight:

     1. sharding/stage.py        `Stage.loss`, a micro-batch's mean cross-entropy; DeepSpeed divides by their number
     2. sharding/regularizer.py  the backward pass adds the penalty's gradient at the stage's output
     3. sharding/products.py     inside a block, `column_linear` sums the gradient of its input over both tp ranks
     4. engine/sharded_adam.py   `Bucket.accumulate` adds a micro-batch's bf16 gradients to float32 sums
     5. engine/sharded_adam.py   `Bucket.send` starts the sum over replicas, each of which gets the part that it steps
     6. engine/sharded_adam.py   `Bucket.sum_partial` adds up over tp what sharding/plan.py calls partial
     7. engine/clipping.py       `global_norm` is taken over all ranks; what both tp ranks hold counts once
     8. engine/telemetry.py      `PendingReport` decides on the device whether the step is accepted
     9. engine/clipping.py       the fused AdamW clips and steps this rank's float32 masters, or leaves them as they are
    10. engine/sharded_adam.py   `Bucket.publish` rounds the masters to bf16 and gathers all replicas' parts
    11. engine/sharded_adam.py   `Bucket.wait_for_weights`, before the next pass uses them

Steps 5 and 10 run beside the passes (engine/buckets.py says how parameters form buckets).
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.initialize import named_parameters
from model.normalized_weights import update_spectral_norms
from model.taper import set_gate, taper_norms
from model.transformer import Block
from parallel.config import ParallelConfig
from parallel.deepspeed_internals import adam, build_instead, check_installed, gradient_norm
from parallel.engine.buckets import ALIGNMENT_BYTES, parameter_groups
from parallel.engine.calibrate import calibrate
from parallel.engine.clipping import decide_on_device
from parallel.engine.compiled import compiled_blocks, uncompiled
from parallel.engine.cuda_graph import replay_training_passes
from parallel.engine.deepspeed_section import check_values
from parallel.engine.pipeline import PipelineStage, inputs_and_labels
from parallel.engine.sharded_adam import Exchange, ShardedAdam
from parallel.engine.telemetry import FINITE, PendingReport, StepLimits
from parallel.launch import local_device
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups, ModelParallelUnit
from parallel.sharding.stage import Stage, StageStatistics
from parallel.sharding.tensor import sum_replicated_gradients
from parallel.sharding.transport import transport
from parallel.stages import block_flops
from parallel.state.chunks import Chunk
from parallel.state.training_state import SavedState, StateMap, adam_step, create_moments, load_training_state

ZERO_3 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 100_000_000,
    "stage3_prefetch_bucket_size": 100_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""DeepSpeed's settings of ZeRO-3 that were fastest at a billion parameters (docs/notes/many-gpus.md)."""


@dataclass(frozen=True)
class EngineConfig:
    """The settings of a run that the engine needs.

    Attributes:
        micro_batch_size: sequences.
        num_micro_batches: in a step, on one replica.
        bf16: whether weights and activations are bfloat16; float32 if not.
        cuda_graphs: whether to replay training passes as CUDA graphs if possible.
        gradient_clipping: largest gradient norm; 0 does not clip.
        weight_decay: of matrices.
        betas: of Adam.
        epsilon: of Adam.
        rate_factors: of learning rates, by the last part of parameters' names (parallel/engine/buckets.py); 0 freezes.
        deepspeed: the user's section, keys of DeepSpeed's own configuration.
    """

    parallel: ParallelConfig
    micro_batch_size: int
    num_micro_batches: int
    bf16: bool
    cuda_graphs: bool
    gradient_clipping: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    rate_factors: dict[str, float]
    deepspeed: dict[str, Any]


class Engine:
    """A stage with its optimizer.

    Args:
        stage: built on this rank's device, in float32.
        groups: of this rank.
        config: batch sizes, precision, optimizer.

    Raises:
        DeepSpeedSectionError: DeepSpeed does not accept `config.deepspeed`.
        LibraryChangedError: the installed DeepSpeed lacks what this project relies on.
    """

    def __init__(self, stage: Stage, groups: Groups, config: EngineConfig) -> None:
        check_installed()
        import deepspeed

        self._stage, self.groups, self.config = stage, groups, config
        self.pipelined, self._is_sharded_adam = groups.grid.pp > 1, uses_sharded_adam(config)
        if config.parallel.zero_stage == 3:
            gather_by_block(stage)
        if not self._is_sharded_adam:
            sum_replicated_gradients(stage.transformer, groups, config.num_micro_batches)
        exchanging_replicas = groups.grid.replicas if self._is_sharded_adam else 1
        optimizer = torch.optim.AdamW(
            parameter_groups(stage.transformer, config.weight_decay, exchanging_replicas, config.rate_factors),
            lr=0.0,
            betas=config.betas,
            eps=config.epsilon,
            fused=True,
        )
        build_instead(ShardedAdam)
        # DeepSpeed prints its partitioning. With gradients enabled, its flat buffers would keep gradient nodes of the
        # parameters alive. Those belong to this stream, which a CUDA graph must not touch.
        is_compiled = bool(compiled_blocks(stage.transformer))
        settings = deepspeed_config(config, groups, is_compiled)
        check_values(settings, config.deepspeed)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            self.engine, *_ = deepspeed.initialize(
                model=PipelineStage(stage, groups) if self.pipelined else stage,
                optimizer=optimizer,
                config=settings,
                mpu=None if self.pipelined else ModelParallelUnit(groups),
                dist_init_required=False,
            )
        is_replayed = replays(stage, groups, config)
        if self._is_sharded_adam:
            exchange = Exchange(
                groups,
                config.num_micro_batches,
                self.engine.communication_data_type,
                overlaps=overlaps(config) and not is_replayed,
                keeps_own_sums=config.parallel.zero_stage == 2,
                summed_late=stage.tied_weight if self.pipelined and groups.embedding_ends is not None else None,
            )
            whole = stage.transformer
            parts = [part for part in (whole.embedding, *whole.layers.values(), whole.head) if part is not None]
            self.engine.optimizer.connect(exchange, parts)
        if is_replayed:
            replay_training_passes(stage)
        clipped_here = config.gradient_clipping if self._is_sharded_adam else 0.0
        decide_on_device(optimizer, self._measure, clipped_here)
        create_moments(self.engine.optimizer, 0)
        check_alignment(stage)
        self.stop_requested = False
        self._taper_norms, self._is_calibrated = taper_norms(stage.transformer), False
        self._limits = FINITE
        self._report: PendingReport | None = None

    @property
    def stage(self) -> Stage:
        """The stage, with all of its weights readable and writable: what replicas still send each other is awaited."""
        if self._is_sharded_adam:
            self.engine.optimizer.wait_for_weights()
        return self._stage

    def train_step(
        self,
        micro_batches: Iterator[MicroBatch],
        learning_rate: float,
        limits: StepLimits = FINITE,
        penalty_strength: float = 1.0,
        norm_gate: float = 1.0,
    ) -> tuple[PendingReport, StageStatistics]:
        """Run the step's micro-batches, and one optimizer step if their report is within the limits.

        The device decides that. With ZeRO-1 and 2 in bf16 nothing here waits for it; DeepSpeed's own optimizers read
        the gradient norm. Set `stop_requested` to tell all ranks through the report that this one was asked to stop.

        Args:
            micro_batches: this rank's; `num_micro_batches` of them are run.
            learning_rate: of this step.
            limits: of loss and gradient norm.
            penalty_strength: by which the regularizer's coefficient is multiplied in this step.
            norm_gate: of tapered norms in this step. Before the first step in which it is below 1, their scales are
                measured on that step's micro-batches, if no checkpoint has brought them.

        Returns:
            The step's report, and this rank's statistics.
        """
        self._limits, self._report = limits, None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        if self._stage.regularizer is not None:
            self._stage.regularizer.strength.fill_(penalty_strength)
        if self._stage.transformer.config.spectral_norm != "none":
            update_spectral_norms(self.stage)
        if self._taper_norms:
            micro_batches = self._taper(norm_gate, micro_batches)
        self.engine.train()
        if self.pipelined:
            self.engine.train_batch(map(inputs_and_labels, micro_batches))
        else:
            for _ in range(self.config.num_micro_batches):
                self.engine.backward(self.engine(*next(micro_batches).tensors))
                self.engine.step()
        report = self._measure()  # with gradients that are not finite ZeRO skips the optimizer, and so the report
        return report, self._stage.take_statistics()

    def _taper(self, gate: float, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Set the gate of tapered norms, calibrated if need be; return the micro-batches, none of them used up."""
        if gate < 1.0 and not self._is_calibrated:
            if not self._taper_norms[0].scale.any():
                held = list(itertools.islice(micro_batches, self.config.num_micro_batches))
                rows = [batch.tokens_TB.shape[1] for batch in held]
                set_gate(self._taper_norms, 1.0)
                with uncompiled(self._stage.transformer):
                    calibrate(self._taper_norms, self.groups, lambda: self.evaluate(iter(held), rows))
                micro_batches = iter(held)
            self._is_calibrated = True
        set_gate(self._taper_norms, gate)
        return micro_batches

    def _measure(self) -> PendingReport:
        """Return the step's report, made at the first call: after the backward passes, before the optimizer."""
        if self._report is None:
            self._report = PendingReport(
                self._stage.complete_statistics(),
                self.groups,
                gradient_norm(self.engine.optimizer),
                self.stop_requested,
                self._limits,
            )
        return self._report

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[MicroBatch], valid_rows: list[int]) -> StageStatistics:
        """Run micro-batches forward and return their statistics.

        The cross-entropy is a sum over tokens whose label is not negative.

        Args:
            micro_batches: this rank's.
            valid_rows: for each micro-batch, how many of its sequences count; the labels of the others are negative.
        """
        if not self.pipelined:
            return evaluate_stage(self.stage, micro_batches, valid_rows)
        self.engine.eval()
        self.stage.statistics, self.stage.valid_rows = None, valid_rows
        self.engine.eval_batch(
            map(inputs_and_labels, micro_batches), num_micro_batches=len(valid_rows), bcast_loss=False
        )
        self.stage.valid_rows = None
        return self.stage.take_statistics()

    def state_chunks(self, vocab_size: int) -> list[Chunk]:
        """Return views of this rank's share of the training state, under global names (see parallel.state).

        Args:
            vocab_size: without padding.
        """
        return StateMap(self.stage, self.groups, vocab_size).saved_chunks(self.optimizer)

    @torch.no_grad()
    def weights_are_finite(self, vocab_size: int) -> bool:
        """Return whether the float32 weights of all ranks are finite; all ranks call.

        A sum is finite only if what it adds up is. So one number is read for each tensor, and none is copied.
        """
        weights = (chunk.tensor for chunk in self.state_chunks(vocab_size) if chunk.name.startswith("model."))
        sums = [tensor.sum(dtype=torch.float32).to(self.device) for tensor in weights]
        bad = torch.zeros(1, device=self.device)
        if sums:
            bad += (~torch.isfinite(torch.stack(sums))).sum()
        dist.all_reduce(bad)
        return not bad.item()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, over this rank's float32 masters."""
        return adam(self.engine.optimizer)

    @property
    def device(self) -> torch.device:
        return local_device()

    @property
    def adam_step(self) -> float:
        """Optimizer steps taken, as Adam's bias correction counts them."""
        return adam_step(self.optimizer)

    def load_state(self, saved: SavedState, vocab_size: int) -> None:
        """Load a training state that any layout saved.

        Args:
            saved: the checkpoint.
            vocab_size: without padding.
        """
        self._is_calibrated = False  # perhaps the state is from before
        load_training_state(self.stage, self.engine.optimizer, self.groups, saved, vocab_size)


@torch.no_grad()
def evaluate_stage(stage: Stage, micro_batches: Iterator[MicroBatch], valid_rows: list[int]) -> StageStatistics:
    """Evaluate like `Engine.evaluate`, through a stage that holds all layers."""
    stage.eval()
    stage.statistics, stage.valid_rows = None, valid_rows
    for _ in valid_rows:
        stage(*next(micro_batches).tensors)
    stage.valid_rows = None
    return stage.take_statistics()


def gather_by_block(stage: Stage) -> None:
    """Make ZeRO-3 gather and release a block's parameters together, with hooks around the block and none inside.

    Hooks inside a block would break its graph when it is compiled, and torch 2.11 loses gradients at graph breaks.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(stage, [Block])


def uses_sharded_adam(config: EngineConfig) -> bool:
    """Return whether `ShardedAdam` runs, and none of DeepSpeed's own optimizers."""
    return config.bf16 and config.parallel.zero_stage < 3


def overlaps(config: EngineConfig) -> bool:
    """Return whether `ShardedAdam` exchanges behind the passes, which DeepSpeed's `overlap_comm` can turn off."""
    return config.deepspeed.get("zero_optimization", {}).get("overlap_comm") is not False


def replays(stage: Stage, groups: Groups, config: EngineConfig) -> bool:
    """Return whether training passes are replayed as CUDA graphs: asked for, on a GPU, possible, and worth it.

    A teacher's passes are not captured.
    """
    per_head = stage.regularizer is not None and stage.regularizer.config.granularity == "per_head"
    wanted = config.cuda_graphs and uses_sharded_adam(config) and next(stage.parameters()).is_cuda
    model, grid = stage.transformer.config, groups.grid
    tokens = config.micro_batch_size * model.seq_length / (grid.tp * grid.cp)
    flops = tokens * block_flops(model, recompute="none")
    if not wanted or stage.distillation is not None or not config.parallel.replays_passes(grid.dp, per_head, flops):
        return False
    return grid.cp == 1 or transport(groups.context).can_be_captured


def deepspeed_config(config: EngineConfig, groups: Groups, is_compiled: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: defaults, then the user's `deepspeed` section, then what ours determines.

    Args:
        config: of the run.
        groups: of this rank.
        is_compiled: whether blocks are compiled. If so, ZeRO-3 must not replace `torch.nn.functional.linear` by its own
            function, through which torch 2.11 loses gradients. If not, it must, or autograd would keep the gathered
            weights until the backward pass.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches,
        "gradient_clipping": config.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        # Partitioned activations give wrong results under sequence parallelism, without an error.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.bf16:
        derived["bf16"] = {"enabled": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}  # or ZeRO 2 and 3 would sum micro-batches in bf16
    if uses_sharded_adam(config):
        derived["gradient_clipping"] = 0.0  # see parallel.engine.clipping
    defaults = {
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device
        "communication_data_type": "fp32",  # or DeepSpeed would average gradients in bf16
    }
    merged = {**defaults, **config.deepspeed, **derived}
    merged["zero_optimization"] = {
        **(ZERO_3 if config.parallel.zero_stage == 3 else {}),
        **config.deepspeed.get("zero_optimization", {}),
        "stage": 1 if uses_sharded_adam(config) else config.parallel.zero_stage,
        "memory_efficient_linear": not is_compiled,
    }
    return merged


def check_alignment(stage: Stage) -> None:
    """Assert that every matrix starts on a 16-byte boundary of its flat buffer."""
    for name, parameter in named_parameters(stage):
        if parameter.is_cuda and parameter.dim() == 2 and name.endswith("weight") and parameter.numel():
            assert parameter.data_ptr() % ALIGNMENT_BYTES == 0, f"{name} is not {ALIGNMENT_BYTES}-byte aligned"
