"""Turn what each rank measured into numbers for the whole model; every reduction here is one sum over all ranks.

A value that several ranks hold enters the sum from one of them. A mean over replicas enters with its share from each. A
value split over ranks enters from each at its place. The sum is then the global value.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.deepspeed_internals import gathered
from parallel.grid import RankGrid
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage, StageStatistics


def _once_on_the_last_stage(grid: RankGrid) -> bool:
    """Return whether this rank counts for a value that every tensor-parallel rank of the last stage holds whole."""
    return grid.is_last_stage and grid.tp_rank == 0


def _in_parts(grid: RankGrid) -> bool:
    """Return whether this rank counts for a value that is a sum over stages and tensor-parallel ranks: always."""
    return True


METRICS: dict[str, Callable[[RankGrid], bool]] = {
    "ce_loss": _once_on_the_last_stage,
    "entropy_loss": _in_parts,
    "distillation_loss": _once_on_the_last_stage,
}
"""Scalars that every step measures, and which ranks' values add up to the model's.

Each is averaged over micro-batches and replicas, and appears under its name in metrics.jsonl and TensorBoard. A new one
is a line here and a call of `Stage.measure` where it is computed. Losses are in nats per token.
"""


def metric_parts(statistics: StageStatistics, groups: Groups) -> Tensor:
    """Return this rank's parts of a step's METRICS: [len(METRICS)], on the device; their sum over ranks is the mean."""
    unknown = statistics.sums.keys() - METRICS.keys()
    assert not unknown, f"not in METRICS: {', '.join(unknown)}"
    zero = statistics.entropy_LN.new_zeros(())
    parts = [statistics.sums.get(name, zero) if holds(groups.grid) else zero for name, holds in METRICS.items()]
    return torch.stack(parts) / (statistics.micro_batches * groups.grid.replicas)


def metric_means(statistics: StageStatistics, groups: Groups) -> dict[str, float]:
    """Return METRICS averaged over micro-batches, replicas and ranks; all ranks call."""
    return dict(zip(METRICS, sum_over_ranks(metric_parts(statistics, groups)).tolist(), strict=True))


@dataclass(frozen=True)
class StepLimits:
    """Limits beyond which a step does not change the weights; a step that is not finite never does.

    Attributes:
        loss: nats per token, the sum of LOSSES.
        gradient_norm: before clipping.
    """

    loss: float = math.inf
    gradient_norm: float = math.inf


FINITE = StepLimits()
LOSSES = ("ce_loss", "entropy_loss", "distillation_loss")
"""METRICS that make up the loss."""


@dataclass(frozen=True)
class StepReport:
    """The measurements of a training step over all ranks, equal on each.

    Attributes:
        means: METRICS by name; losses in nats per token.
        gradient_norm: before clipping; infinite if any gradient is not finite.
        stop_requested: whether any rank was asked to stop.
        accepted: whether the step was within its limits, and so changed the weights.
    """

    means: dict[str, float]
    gradient_norm: float
    stop_requested: bool
    accepted: bool

    @property
    def cross_entropy(self) -> float:
        return self.means["ce_loss"]

    @property
    def entropy_loss(self) -> float:
        return self.means["entropy_loss"]

    @property
    def loss(self) -> float:
        """The sum of LOSSES, in nats per token."""
        return sum(mean for name, mean in self.means.items() if name in LOSSES)


class PendingReport:
    """A step's report that the device may still be computing; acceptance is decided on the device and read later.

    Args:
        statistics: of this rank.
        gradient_norm: of the whole model; DeepSpeed has already reduced it, so rank 0's value is used.
        stop_requested: whether this rank was asked to stop.
        limits: beyond which the step is refused.

    Attributes:
        gradient_norm: scalar on the device; infinite if the gradients are not finite.
        accepted: bool scalar on the device.
    """

    def __init__(
        self,
        statistics: StageStatistics,
        groups: Groups,
        gradient_norm: Tensor | float,
        stop_requested: bool,
        limits: StepLimits,
    ) -> None:
        parts = metric_parts(statistics, groups)
        norm = torch.zeros_like(parts[:1])
        if groups.grid.rank == 0:
            norm += gradient_norm
        summed = sum_over_ranks(torch.cat([parts, norm, torch.full_like(norm, float(stop_requested))]))
        means, norm, stops = summed[: len(METRICS)], summed[-2], summed[-1]
        loss = sum(mean for name, mean in zip(METRICS, means, strict=True) if name in LOSSES)
        bad = norm.isfinite().logical_not() | (norm < 0)  # DeepSpeed: -1 for NaN
        self.gradient_norm = norm.masked_fill(bad, math.inf)
        finite = loss.isfinite() & self.gradient_norm.isfinite()
        self.accepted = finite & (loss <= limits.loss) & (norm <= limits.gradient_norm)
        numbers = torch.cat([means, torch.stack([self.gradient_norm, stops, self.accepted.double()])])
        self._numbers = numbers.to("cpu", non_blocking=True)  # into page-locked memory, if from a GPU
        self._copied = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> StepReport:
        """Wait until the device has reached this step's optimizer, and return the report."""
        if self._copied is not None:
            self._copied.synchronize()
        *means, norm, stops, accepted = self._numbers.tolist()
        return StepReport(dict(zip(METRICS, means, strict=True)), norm, stops > 0, accepted > 0)


def sum_over_ranks(parts: Tensor) -> Tensor:
    """Return the sum of a small tensor over all ranks, in float64."""
    total = parts.detach().to(torch.float64)
    dist.all_reduce(total)
    return total


@dataclass(frozen=True)
class HeadSnapshot:
    """Every head and layer of the whole model at one moment; a value is None if the architecture lacks its parameter.

    Attributes:
        entropy_nats: [L][N], mean over sequences and positions.
        threshold: [L][N], as a fraction of ln T.
        temperature: [L][N], mean over positions.
        temperature_min: [L], least of any head and position.
        temperature_max: [L], greatest of any head and position.
        alpha: [L].
        beta: [L].
    """

    entropy_nats: list[list[float]]
    threshold: list[list[float]] | None
    temperature: list[list[float]] | None
    temperature_min: list[float] | None
    temperature_max: list[float] | None
    alpha: list[float] | None
    beta: list[float] | None

    def as_row(self) -> dict[str, Any]:
        """Return the snapshot as a JSON object."""
        return dict(vars(self))


FIELDS_OF_HEADS = ("entropy", "threshold", "temperature", "temperature_min", "temperature_max")
FIELDS_OF_LAYERS = ("alpha", "beta")


@torch.no_grad()
def head_snapshot(stage: Stage, statistics: StageStatistics, groups: Groups) -> HeadSnapshot:
    """Collect entropies, thresholds, temperatures, alpha and beta of the whole model in one reduction; all ranks call.

    Args:
        statistics: whose entropies to report, as means over sequences and positions.
    """
    grid, config = groups.grid, stage.transformer.config
    computed, per_shard = grid.heads(config.num_attention_heads), config.num_attention_heads // grid.tp
    held = slice(grid.tp_rank * per_shard, (grid.tp_rank + 1) * per_shard)
    device = statistics.entropy_LN.device
    heads = torch.zeros(
        len(FIELDS_OF_HEADS), config.num_layers, config.num_attention_heads, dtype=torch.float64, device=device
    )
    layers = torch.zeros(len(FIELDS_OF_LAYERS), config.num_layers, dtype=torch.float64, device=device)
    sequences = torch.zeros(1, dtype=torch.float64, device=device)
    if grid.stage == grid.tp_rank == grid.cp_rank == 0:
        sequences += statistics.sequences
    with whole_vectors(stage):
        for row, (name, block) in enumerate(stage.transformer.layers.items()):
            layer = int(name)
            heads[0, layer, computed.start : computed.stop] = statistics.entropy_LN[row]
            if grid.replica == 0:
                heads[1:, layer, held] = _head_parameters(block.attention)
            if grid.replica == 0 and grid.tp_rank == 0 and block.ffn.alpha is not None:
                layers[:, layer] = torch.stack([block.ffn.alpha, block.ffn.beta]).flatten().double()
    flat = sum_over_ranks(torch.cat([heads.flatten(), layers.flatten(), sequences]))
    heads, layers, sequences = flat.split([heads.numel(), layers.numel(), 1])
    heads, layers = heads.view(len(FIELDS_OF_HEADS), config.num_layers, -1), layers.view(len(FIELDS_OF_LAYERS), -1)
    heads[0] /= sequences
    heads_list, layers_list = heads.tolist(), layers.tolist()
    tempered, scaled = config.temperature != "none", bool(config.scaled_ffn)
    return HeadSnapshot(
        entropy_nats=heads_list[0],
        threshold=heads_list[1] if config.regularized else None,
        temperature=heads_list[2] if tempered else None,
        temperature_min=[min(row) for row in heads_list[3]] if tempered else None,
        temperature_max=[max(row) for row in heads_list[4]] if tempered else None,
        alpha=layers_list[0] if scaled else None,
        beta=layers_list[1] if scaled else None,
    )


def _head_parameters(attention: torch.nn.Module) -> Tensor:
    """Return each held head's threshold, and its mean, least and greatest temperature: [4, N]."""
    heads = attention.query_bias.shape[0]
    values = torch.zeros(4, heads, dtype=torch.float64, device=attention.query_bias.device)
    if attention.threshold is not None:
        values[0] = attention.threshold.double()
    temperature = attention.temperature()
    if temperature is not None:
        by_head = temperature.double().view(heads, -1)
        values[1:] = torch.stack([by_head.mean(1), by_head.amin(1), by_head.amax(1)])
    return values


def whole_vectors(stage: Stage) -> AbstractContextManager[None]:
    """Make vectors and scalars that ZeRO-3 has partitioned whole while the context lasts; all ranks enter."""
    return gathered([parameter for name, parameter in stage.named_parameters() if not name.endswith("weight")])
