"""The one door to DeepSpeed's engine: a training step, an evaluation, a checkpoint, for every layout.

With one pipeline stage this is DeepSpeed's plain engine (ZeRO 1 to 3), with more its pipeline engine (ZeRO 1).
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model.initialize import named_parameters
from model.normalized_weights import update_spectral_norms
from model.transformer import Block
from parallel.config import ParallelConfig
from parallel.deepspeed_internals import adam, check_installed, gradient_norm
from parallel.engine.accumulation import accumulate_together, scatter_averages
from parallel.engine.clipping import decide_on_device, leave_norms_on_device
from parallel.engine.compiled import compiled_blocks
from parallel.engine.cuda_graph import replay_training_passes
from parallel.engine.deepspeed_section import handed_over
from parallel.engine.pipeline import PipelineStage, inputs_and_labels
from parallel.engine.telemetry import FINITE, PendingReport, StepLimits
from parallel.launch import local_device
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups, ModelParallelUnit
from parallel.sharding.stage import Stage, StageStatistics
from parallel.state.chunks import Chunk
from parallel.state.training_state import SavedState, StateMap, adam_step, create_moments, load_training_state

ALIGNMENT_BYTES = 16
ALIGNMENT_ELEMENTS = 8  # of bfloat16


@dataclass(frozen=True)
class EngineConfig:
    """What the engine needs to know of a run."""

    parallel: ParallelConfig
    micro_batch_size: int
    num_micro_batches: int
    bf16: bool
    cuda_graphs: bool
    gradient_clipping: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    deepspeed: dict[str, Any]


class Engine:
    """A stage with its optimizer.

    Args:
        stage: built on this rank's device, in float32.
        config: batch sizes, precision, optimizer.

    Raises:
        DeepSpeedSectionError: `config.deepspeed` is not what DeepSpeed takes.
        LibraryChangedError: the installed DeepSpeed lacks what this project relies on.
    """

    def __init__(self, stage: Stage, groups: Groups, config: EngineConfig) -> None:
        check_installed()
        import deepspeed

        self.stage, self.groups, self.config = stage, groups, config
        self.pipelined = groups.grid.pp > 1
        if config.parallel.zero_stage == 3:
            gather_by_block(stage)
        optimizer = torch.optim.AdamW(
            parameter_groups(stage, config.weight_decay),
            lr=0.0,
            betas=config.betas,
            eps=config.epsilon,
            fused=True,
        )
        # DeepSpeed prints its partitioning; and its flat buffers would keep how they were made from the parameters,
        # whose gradient nodes then live on and remember this stream, with which a graph must have nothing to do.
        is_compiled = bool(compiled_blocks(stage.transformer))
        settings = handed_over(deepspeed_config(config, groups, is_compiled), config.deepspeed)
        with settings as handed, contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            self.engine, *_ = deepspeed.initialize(
                model=PipelineStage(stage, groups) if self.pipelined else stage,
                optimizer=optimizer,
                config=handed,
                mpu=None if self.pipelined else ModelParallelUnit(groups),
                dist_init_required=False,
            )
        if uses_bf16_optimizer(config):
            leave_norms_on_device()
            accumulate_together(self.engine.optimizer)
            scatter_averages(self.engine)
        if can_replay(stage, groups, config):
            replay_training_passes(stage)
        clipped_here = config.gradient_clipping if uses_bf16_optimizer(config) else 0.0
        decide_on_device(optimizer, self._measure, clipped_here)
        create_moments(self.engine.optimizer, 0)
        check_alignment(stage)
        self.stop_requested = False
        self._limits = FINITE
        self._report: PendingReport | None = None

    def train_step(
        self, micro_batches: Iterator[MicroBatch], learning_rate: float, limits: StepLimits = FINITE
    ) -> tuple[PendingReport, StageStatistics]:
        """Runs `num_micro_batches` and, if what they measured lies within `limits`, one optimizer step.

        That is decided on the device: with ZeRO-1 in bf16 nothing here waits for it (DeepSpeed's other optimizers read
        the norm of the gradients). Set `stop_requested` to tell all ranks through the report that this one was asked to
        stop.
        """
        self._limits, self._report = limits, None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        update_spectral_norms(self.stage)
        self.engine.train()
        if self.pipelined:
            self.engine.train_batch(map(inputs_and_labels, micro_batches))
        else:
            for _ in range(self.config.num_micro_batches):
                self.engine.backward(self.engine(*next(micro_batches).tensors))
                self.engine.step()
        report = self._measure()  # where the gradients are not finite ZeRO leaves the optimizer out, which never asked
        return report, self.stage.take_statistics()

    def _measure(self) -> PendingReport:
        """The step's report, made where it is first asked for: after the backward pass, before the optimizer."""
        if self._report is None:
            norm, told = gradient_norm(self.engine.optimizer), (self.stop_requested, self._limits)
            self._report = PendingReport(self.stage.complete_statistics(), self.groups, norm, *told)
        return self._report

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[MicroBatch], valid_rows: list[int]) -> StageStatistics:
        """Runs micro-batches forward; the cross-entropy is a sum over tokens whose label is not negative.

        Args:
            valid_rows: of each micro-batch, how many of its sequences count; the others' labels are negative.
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
        """Views of this rank's share of the training state, under global names (see parallel.state.training_state)."""
        return StateMap(self.stage, self.groups, vocab_size).saved_chunks(self.optimizer)

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
        """Restores the training state, whatever layout saved it."""
        load_training_state(self.stage, self.engine.optimizer, self.groups, saved, vocab_size)


@torch.no_grad()
def evaluate_stage(stage: Stage, micro_batches: Iterator[MicroBatch], valid_rows: list[int]) -> StageStatistics:
    """Like `Engine.evaluate`, through a stage that is the whole model's depth."""
    stage.eval()
    stage.statistics, stage.valid_rows = None, valid_rows
    for _ in valid_rows:
        stage(*next(micro_batches).tensors)
    stage.valid_rows = None
    return stage.take_statistics()


def parameter_groups(stage: Stage, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, apart from everything else, which does not.

    Apart also because ZeRO makes one flat buffer of a group: a single odd-sized scalar in it would shift every matrix
    behind it off the 16-byte grid that Hopper's fast matrix products need. Among the others, those of odd sizes come
    last: compiled kernels read vectors 16 bytes at a time.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters(stage):
        (matrices if name.endswith("weight") and parameter.dim() == 2 else others).append(parameter)
    others.sort(key=lambda parameter: parameter.numel() % ALIGNMENT_ELEMENTS != 0)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def gather_by_block(stage: Stage) -> None:
    """Lets ZeRO-3 gather and release the parameters of a block at once, with hooks around the block and none inside.

    The compiler then sees a block's pure computation. Hooks within it would cut it into graphs, between which torch
    2.11 loses gradients.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(stage, [Block])


def uses_bf16_optimizer(config: EngineConfig) -> bool:
    """Whether DeepSpeed's bf16 optimizer runs, which accumulates in float32 and can be kept from waiting; ZeRO-1's."""
    return config.bf16 and config.parallel.zero_stage == 1


def can_replay(stage: Stage, groups: Groups, config: EngineConfig) -> bool:
    """Whether a training pass may be replayed, and is the same kernels every time, without communication, on a GPU."""
    per_head = stage.regularizer is not None and stage.regularizer.config.granularity == "per_head"
    local = config.parallel.passes_stay_local(groups.grid.dp, per_head)
    return config.cuda_graphs and local and uses_bf16_optimizer(config) and next(stage.parameters()).is_cuda


def deepspeed_config(config: EngineConfig, groups: Groups, is_compiled: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: what is derived from ours, over the user's `deepspeed` section.

    Args:
        is_compiled: whether blocks are. If so, ZeRO-3 must not replace `torch.nn.functional.linear` by a function of
            its own, through which torch 2.11 loses gradients. If not, it must: autograd would keep views of gathered
            weights, and so the weights, until the backward pass.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches,
        "gradient_clipping": config.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        # Partitioned activations are silently wrong under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.bf16:
        derived["bf16"] = {"enabled": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}  # else ZeRO 2 and 3 sum micro-batches in bf16
    if uses_bf16_optimizer(config):
        derived["gradient_clipping"] = 0.0  # see parallel.engine.clipping
    defaults = {
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device
        "communication_data_type": "fp32",  # of gradients, which DeepSpeed averages in bf16
    }
    merged = {**defaults, **config.deepspeed, **derived}
    merged["zero_optimization"] = {
        **config.deepspeed.get("zero_optimization", {}),
        "stage": config.parallel.zero_stage,
        "memory_efficient_linear": not is_compiled,
    }
    return merged


def check_alignment(stage: Stage) -> None:
    """Asserts that every matrix starts on a 16-byte boundary of its flat buffer."""
    for name, parameter in named_parameters(stage):
        if parameter.is_cuda and parameter.dim() == 2 and name.endswith("weight") and parameter.numel():
            assert parameter.data_ptr() % ALIGNMENT_BYTES == 0, f"{name} is not {ALIGNMENT_BYTES}-byte aligned"
