"""Measures one step of a configuration on processes of this machine: losses, gradients, entropies, traffic."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.stream.document_starts import document_starts
from model.initialize import TIED_HEAD_SOURCE, generator, named_parameters
from model.taper import set_gate, taper_norms
from model.transformer import global_shapes
from parallel.deepspeed_internals import whole_shape
from parallel.grid import RankGrid
from parallel.local_ranks import RankError, run_ranks
from parallel.micro_batch import MicroBatch, micro_batch
from parallel.sharding.stage import StageStatistics
from parallel.state.training_state import piece_of, source
from train.config import Config

CONFIGURED = "configured"
END_OF_DOCUMENT = 0  # the token that ends documents in batches without a dataset
AGREEMENT = {torch.float32: 1e-6, torch.float64: 1e-13}
HALF_TAPERED = 0.375  # the gate of tapered norms; float32 holds it exactly
NO_CLIPPING = 1e30  # a limit, since the norm is wanted all the same


@dataclass(frozen=True)
class GradientPiece:
    """What one rank holds of a parameter's gradient: elements of a flattened shard, from `start` on.

    The shard is number `place` along `dim`. If `dim` is None, the shard is the whole parameter.
    """

    shard_shape: tuple[int, ...]
    dim: int | None
    place: int
    start: int
    values: Tensor


LocalGradients = dict[str, GradientPiece]
"""By global name."""


@dataclass
class Measured:
    """What layouts must agree on for every global batch: losses in nats per token, gradients by global name."""

    losses: Tensor  # [batches, 3]: cross-entropy, entropy loss, gradient norm
    gradients: list[dict[str, Tensor]]
    entropy_nats: list[Tensor]  # [L, N] each
    sent_bytes: dict[str, int]  # per step by axis, from the rank that sends most


def measure(config: Config, world_size: int, vocab_size: int, batches: Tensor, dtype: str) -> Measured:
    """Run one step for each global batch, with weights near their initial values (`tell_apart`).

    Args:
        config: its parallel sizes fit `world_size` processes.
        batches: tokens, [count, global batch, T + 1].
        dtype: 'float32' runs the engine. 'float64' runs the same stages without an optimizer. 'configured' runs the
            engine as training does: precision, compiling and CUDA graphs as configured. Bytes are then not counted,
            because counting them disables the compiler.

    Raises:
        RankError: a process failed.
    """
    use_gpu = torch.cuda.is_available()
    ranks = run_ranks(_measure_on_rank, world_size, config, vocab_size, batches, dtype, use_gpu=use_gpu)
    axes = sorted({axis for rank in ranks for axis in rank["sent_bytes"]})
    return Measured(
        losses=ranks[0]["losses"],
        gradients=[assemble([rank["gradients"][i] for rank in ranks], vocab_size) for i in range(len(batches))],
        entropy_nats=ranks[0]["entropy_nats"],
        sent_bytes={axis: max(rank["sent_bytes"].get(axis, 0) for rank in ranks) for axis in axes},
    )


def assemble(ranks: list[LocalGradients], vocab_size: int) -> dict[str, Tensor]:
    """Assemble whole gradients from the pieces of all ranks, without padding rows.

    Raises:
        RankError: ranks that hold the same elements disagree about them.
    """
    shards: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int | None] = {}
    for rank, held in enumerate(ranks):
        for name, piece in held.items():
            dims[name] = piece.dim
            missing = piece.values.new_full(piece.shard_shape, torch.nan)
            shard = shards.setdefault(name, {}).setdefault(piece.place, missing).view(-1)
            found = shard[piece.start : piece.start + piece.values.numel()]
            known = ~found.isnan()
            error = (found - piece.values)[known].norm()
            if error > AGREEMENT[found.dtype] * piece.values.norm():
                raise RankError(f"rank {rank} holds another gradient of {name} than the ranks before it")
            found.copy_(piece.values)
    whole = {}
    for name, parts in shards.items():
        dim = dims[name]
        whole[name] = parts[0] if dim is None else torch.cat([parts[place] for place in sorted(parts)], dim=dim)
        if name in (TIED_HEAD_SOURCE, "head.weight"):
            whole[name] = whole[name][:vocab_size]
    return whole


class Step(Protocol):
    """Runs single steps and keeps their gradients readable."""

    groups: Any

    @property
    def stage(self) -> Any: ...

    def run(self, micro_batches: Iterator[MicroBatch]) -> StageStatistics: ...

    def losses(self, statistics: StageStatistics) -> list[float]:
        """Return cross-entropy, entropy loss and gradient norm, over all ranks."""
        ...

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None: ...


class EngineStep:
    """The training engine at learning rate 0. With beta1 = 0, Adam's first moment is the gradient."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        from train.parts import add_optimizer, build_stage

        optimizer = dataclasses.replace(config.optimizer, beta1=0.0, gradient_clipping=NO_CLIPPING)
        health = dataclasses.replace(config.health, verify_first_step=True)
        config = dataclasses.replace(config, health=health)
        stage, self.groups = build_stage(config, vocab_size)
        tell_apart(stage, self.groups, vocab_size, config.training.seed)
        self.engine = add_optimizer(stage, self.groups, dataclasses.replace(config, optimizer=optimizer))

    @property
    def stage(self) -> Any:
        return self.engine.stage

    def run(self, micro_batches: Iterator[MicroBatch]) -> StageStatistics:
        report, statistics = self.engine.train_step(micro_batches, learning_rate=0.0, norm_gate=HALF_TAPERED)
        self.report = report.wait()
        return statistics

    def losses(self, statistics: StageStatistics) -> list[float]:
        return [self.report.cross_entropy, self.report.entropy_loss, self.report.gradient_norm]

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """Return the piece that ZeRO left on this rank, after its first element's index; None if there is none."""
        piece = piece_of(parameter, self.engine.engine.optimizer.optimizer, self.groups)
        return None if piece is None else (piece.start, piece.moments["exp_avg"])


class ExactStep:
    """The same stages in float64, up to the gradients."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        from train.parts import build_stage

        self.config = config
        self.stage, self.groups = build_stage(config, vocab_size, torch.float64)
        tell_apart(self.stage, self.groups, vocab_size, config.training.seed)
        set_gate(taper_norms(self.stage.transformer), HALF_TAPERED)

    def run(self, micro_batches: Iterator[MicroBatch]) -> StageStatistics:
        from parallel.state.gradients import accumulate_gradients

        return accumulate_gradients(
            self.stage,
            self.groups,
            micro_batches,
            num_micro_batches=self.config.num_micro_batches(self.groups.grid.world_size),
            sequence_parallel=self.config.parallel.sequence_parallel,
        )

    def losses(self, statistics: StageStatistics) -> list[float]:
        from parallel.engine.telemetry import metric_means
        from parallel.state.gradients import gradient_norm

        means = metric_means(statistics, self.groups)
        return [means["ce_loss"], means["entropy_loss"], gradient_norm(self.stage, self.groups)]

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        assert parameter.grad is not None
        return (0, parameter.grad.flatten()) if self.groups.grid.replica == 0 else None


@torch.no_grad()
def tell_apart(stage: Any, groups: Any, vocab_size: int, seed: int) -> None:
    """Change parameters that start alike for all heads and layers by random tenths.

    These are temperatures, thresholds, biases, alpha, beta and norms. If they stayed alike, a layout could mix up heads
    unnoticed. Tapered norms get random scales.
    """
    from parallel.sharding.tensor import cut

    shard = cut(stage.transformer, groups)
    shapes = global_shapes(stage.transformer.config, vocab_size)
    for name, parameter in named_parameters(stage.transformer):
        if name != "head.weight" and (not name.endswith("weight") or len(shapes[name]) == 1):
            noise = torch.randn(shapes[name], generator=generator(seed, f"apart/{name}"))
            size = torch.where(parameter == 0, 1.0, parameter.abs())
            parameter += 0.1 * size * shard(name, noise).to(parameter)
    for name, buffer in stage.transformer.named_buffers():
        if name.endswith(".scale"):
            buffer.copy_(1 + torch.rand(buffer.shape, generator=generator(seed, f"apart/{name}")))


def _measure_on_rank(config: Config, vocab_size: int, batches: Tensor, dtype: str) -> dict[str, Any]:
    from parallel.counting.traffic import TrafficCounter
    from parallel.engine.telemetry import head_snapshot

    step: Step = ExactStep(config, vocab_size) if dtype == "float64" else EngineStep(config, vocab_size)
    losses, gradients, entropies = [], [], []
    counted: dict[str, int] = {}
    for batch in batches:
        with contextlib.nullcontext() if dtype == CONFIGURED else TrafficCounter(step.groups) as traffic:
            statistics = step.run(_micro_batches(config, step.groups.grid, batch))
        losses.append(step.losses(statistics))
        gradients.append(_local_gradients(step))
        heads = head_snapshot(step.stage, statistics, step.groups)
        entropies.append(torch.tensor(heads.entropy_nats, dtype=torch.float64))
        counted = {} if traffic is None else dict(traffic.bytes)
    if dtype == CONFIGURED and config.training.compiles(torch.cuda.is_available()):
        _check_compiled(step.stage)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "gradients": gradients,
        "entropy_nats": entropies,
        "sent_bytes": counted,
    }


def _check_compiled(stage: Any) -> None:
    """Raise RankError if blocks ran uncompiled, or have other gradients than the same blocks uncompiled."""
    from parallel.engine.compiled import NOT_COMPILED, compiled_blocks, was_compiled

    if not was_compiled(stage.transformer):
        raise RankError(NOT_COMPILED)
    for block in compiled_blocks(stage.transformer):
        errors = block.errors()
        if not errors:
            raise RankError(f"layer {block.layer} was to be compiled, and did not run so")
        wrong = [error for error in errors if not error.relative <= error.allowed]
        if wrong:
            raise RankError(
                f"compiled, {wrong[0].name} has a gradient that is {wrong[0].relative:.1e} off the uncompiled block's"
            )


def _local_gradients(step: Step) -> LocalGradients:
    grid = step.groups.grid
    held = {}
    for name, parameter in named_parameters(step.stage.transformer):
        piece, dim = step.gradient(parameter), parameter.partition_dim
        if piece is not None:
            place, shape = 0 if dim is None else grid.tp_rank, tuple(whole_shape(parameter))
            held[source(name, step.stage)] = GradientPiece(shape, dim, place, piece[0], piece[1].detach().cpu().clone())
    return held


def _micro_batches(config: Config, grid: RankGrid, batch_BT: Tensor) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches in the order in which the data stream deals sequences out."""
    from parallel.launch import local_device

    size = config.training.micro_batch_size
    for index in range(config.num_micro_batches(grid.world_size)):
        start = (index * grid.dp + grid.dp_rank) * size
        rows_BT, starts_BT = batch_BT[start : start + size], None
        if config.data.attention_within_documents:
            starts = document_starts(rows_BT[:, :-1].numpy(), END_OF_DOCUMENT)
            starts_BT = torch.from_numpy(starts).to(local_device())
        yield micro_batch(rows_BT.to(local_device()), grid.positions(rows_BT.shape[1] - 1), starts_BT)
