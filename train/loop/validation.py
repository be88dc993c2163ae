"""Measures cross-entropy and head entropies on the validation split, over all ranks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.shards.manifest import Manifest
from model.taper import set_gate, taper_norms
from parallel.engine.telemetry import HeadSnapshot, head_snapshot, metric_means
from parallel.launch import local_device
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage, StageStatistics
from train.config import Config
from train.config.schedule import norm_gate
from train.parts import micro_batches, open_stream


@dataclass(frozen=True)
class Validation:
    """What a validation measured.

    Attributes:
        loss: mean cross-entropy in nats per token, without the regularizer, which acts only in training.
        halves: the same over the first and over the second half of the batches, so that a setting can be chosen on one
            and reported on the other; None with a single batch. Batches are those of all replicas together.
        tokens: how many were predicted.
        heads: entropies and parameters of every head.
    """

    loss: float
    halves: tuple[float, float] | None
    tokens: int
    heads: HeadSnapshot

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


Evaluate = Callable[[Iterator[MicroBatch], list[int]], StageStatistics]


def validate(
    stage: Stage, groups: Groups, config: Config, step: int, limit_samples: int | None, evaluate: Evaluate
) -> Validation:
    """Evaluate the first `limit_samples` validation sequences (None: all), each once; all ranks call.

    Args:
        step: how many optimizer steps the weights have taken.
        evaluate: runs micro-batches through the stage; its second argument says how many rows of each count.
    """
    grid = groups.grid
    set_gate(taper_norms(stage.transformer), norm_gate(config, step))
    stream = open_stream(config, grid, "validation", limit_samples)
    batches, rows = micro_batches(stream, grid, local_device()), stream.valid_rows_by_batch
    middle = len(rows) // 2
    parts = [evaluate(batches, part) for part in (rows[:middle], rows[middle:]) if part]
    stream.close()
    heads = head_snapshot(stage, sum(parts[1:], start=parts[0]), groups)
    # The mean over micro-batches and replicas of sums over tokens.
    sums = [metric_means(part, groups)["ce_loss"] * part.micro_batches * grid.replicas for part in parts]
    tokens = validation_tokens(stream.manifest, config, limit_samples)
    halves = None
    if len(parts) == 2:
        first = middle * config.training.micro_batch_size * grid.dp * config.model.seq_length
        halves = (sums[0] / first, sums[1] / (tokens - first))
    return Validation(sum(sums) / tokens, halves, tokens, heads)


def validation_tokens(manifest: Manifest, config: Config, limit_samples: int | None) -> int:
    """Return how many tokens `validate` predicts."""
    samples = manifest.num_samples("validation", config.model.seq_length)
    return (samples if limit_samples is None else min(samples, limit_samples)) * config.model.seq_length
