"""From what each rank measured to one number for the whole model: every reduction here is one sum over all ranks.

A quantity that several ranks hold enters from one of them, a mean over replicas enters with its share from each,
and a quantity split over ranks enters from each in its place; the sum then is the global value.
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
    """Whether a value counts that every tensor-parallel rank of the last stage holds whole."""
    return grid.is_last_stage and grid.tp_rank == 0


def _in_parts(grid: RankGrid) -> bool:
    """Whether a value counts of which every stage and tensor-parallel rank holds one addend: always."""
    return True


METRICS: dict[str, Callable[[RankGrid], bool]] = {"ce_loss": _once_on_the_last_stage, "entropy_loss": _in_parts}
"""Scalars that every step measures, and which ranks' values add up to the model's.

Each is averaged over micro-batches and replicas, and appears under its name in metrics.jsonl and TensorBoard. A new one
is a line here and a call of `Stage.measure` where it is computed. Both losses are in nats per token.
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
    """What a step's numbers may be at most for it to change the weights; what is not finite never may."""

    loss: float = math.inf  # nats a token, cross-entropy and entropy loss together
    gradient_norm: float = math.inf  # before clipping


FINITE = StepLimits()
LOSSES = ("ce_loss", "entropy_loss")
"""METRICS that make up the loss."""


@dataclass(frozen=True)
class StepReport:
    """What a training step measured, over all ranks and equal on all of them.

    Attributes:
        means: METRICS by name; losses in nats per token.
        gradient_norm: before clipping; infinite if any gradient is not finite.
        stop_requested: whether any rank was asked to stop.
        accepted: whether the step lay within its limits, and so changed the weights.
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
        return self.cross_entropy + self.entropy_loss


class PendingReport:
    """A step's report while the device may still be at work on it: decided there, read later.

    Attributes:
        gradient_norm: scalar on the device, infinite where the gradients are not finite.
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
        """One reduction over all ranks; the norm, which DeepSpeed has reduced already, counts as rank 0 has it."""
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
        self._numbers = numbers.to("cpu", non_blocking=True)  # page-locked, if it comes from a GPU
        self._copied = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> StepReport:
        """Waits for the device to have got as far as this step's optimizer."""
        if self._copied is not None:
            self._copied.synchronize()
        *means, norm, stops, accepted = self._numbers.tolist()
        return StepReport(dict(zip(METRICS, means, strict=True)), norm, stops > 0, accepted > 0)


def sum_over_ranks(parts: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in float64 since it is small and read by people."""
    total = parts.detach().to(torch.float64)
    dist.all_reduce(total)
    return total


@dataclass(frozen=True)
class HeadSnapshot:
    """Every head and layer of the whole model at one moment; None where the architecture has no such parameter."""

    entropy_nats: list[list[float]]  # [L][N]
    threshold: list[list[float]] | None  # [L][N], fraction of ln T
    temperature: list[list[float]] | None  # [L][N], mean over positions
    temperature_min: list[float] | None  # [L]
    temperature_max: list[float] | None
    alpha: list[float] | None
    beta: list[float] | None

    def as_row(self) -> dict[str, Any]:
        return dict(vars(self))


FIELDS_OF_HEADS = ("entropy", "threshold", "temperature", "temperature_min", "temperature_max")
FIELDS_OF_LAYERS = ("alpha", "beta")


@torch.no_grad()
def head_snapshot(stage: Stage, statistics: StageStatistics, groups: Groups) -> HeadSnapshot:
    """Collects entropies (mean over sequences and positions), thresholds, temperatures, alpha, beta; one reduction."""
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
    """Threshold and mean, least and greatest temperature of each head held: [4, N]."""
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
