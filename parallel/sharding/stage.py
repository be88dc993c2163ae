"""One pipeline stage: its part of the model, its part of the regularizer, and the statistics that it collects."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.config import ParallelConfig, padded_vocab_size
from parallel.distillation import Distillation
from parallel.sharding.context import apply_context_parallel
from parallel.sharding.megatron import Groups
from parallel.sharding.plan import sharding_plan
from parallel.sharding.regularizer import ShardedRegularizer
from parallel.sharding.tensor import apply_tensor_parallel, cut, mark_split


@dataclass
class StageStatistics:
    """Statistics of this rank, summed over micro-batches.

    Attributes:
        micro_batches: how many were run.
        sequences: how many were run.
        entropy_LN: entropy in nats of each head whose attention this rank computes: [layers, heads] on the device.
            Averaged over positions, summed over sequences.
        sums: scalars on the device, by their name in `parallel.engine.telemetry.METRICS`.
    """

    micro_batches: int
    sequences: int
    entropy_LN: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "StageStatistics") -> "StageStatistics":
        both = StageStatistics(
            self.micro_batches + other.micro_batches,
            self.sequences + other.sequences,
            self.entropy_LN + other.entropy_LN,
            dict(self.sums),
        )
        for name, value in other.sums.items():
            both.add(name, value)
        return both

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar to the sum of that name."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class Stage(nn.Module):
    """The layers, ends and regularizer of one rank.

    `forward` returns the mean cross-entropy per token in training. In evaluation it returns the sum over tokens whose
    label is not negative.

    Attributes:
        statistics: collected since they were last taken; None if no micro-batch was run.
        valid_rows: for each micro-batch of an evaluation, how many of its first sequences count; None means all.
        distillation: a teacher, which counts in training; only of a stage that holds all layers.
    """

    def __init__(self, transformer: Transformer, regularizer: ShardedRegularizer | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.regularizer = regularizer
        self.statistics: StageStatistics | None = None
        self.valid_rows: list[int] | None = None
        self.distillation: Distillation | None = None
        self._penalties: list[Callable[[], Tensor]] = []

    @property
    def thresholds_LN(self) -> Tensor:
        """The thresholds of this stage's layers and heads, as a fraction of ln T."""
        return torch.stack([block.attention.threshold for block in self.transformer.layers.values()])

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The word embedding that a tied head shares, or this stage's copy; None if untied and on middle stages."""
        transformer = self.transformer
        if not transformer.config.tied_head:
            return None
        if transformer.embedding is not None:
            return transformer.embedding.word.weight
        return None if transformer.head is None else transformer.head.weight

    def body(
        self, x: Tensor, document_start_BT: Tensor | None = None, states_TBD: list[Tensor] | None = None
    ) -> Tensor:
        """Run the layers: tokens [T, B] or hidden states [T, B, D] -> hidden states.

        In training the penalty is attached to the result, and its gradient enters in the backward pass.
        """
        x_TBD, entropies_BNT = self.transformer.hidden_states(x, document_start_BT, states_TBD)
        entropy_LBNT = torch.stack(entropies_BNT)
        self._record(entropy_LBNT.detach())
        if self.regularizer is not None and self.training:
            x_TBD, penalty = self.regularizer.attach(x_TBD, entropy_LBNT, self.thresholds_LN, document_start_BT)
            self._penalties.append(penalty)
        return x_TBD

    def loss(self, x_TBD: Tensor, labels_TB: Tensor) -> Tensor:
        """Return the cross-entropy of hidden states [T, B, D] and labels [T, B], a float32 scalar in nats."""
        assert self.transformer.head is not None
        loss = self.transformer.head(x_TBD, labels_TB)
        if self.training:
            loss = loss / labels_TB.numel()
        self.measure("ce_loss", loss)
        return loss

    def forward(self, tokens_TB: Tensor, labels_TB: Tensor, document_start_BT: Tensor | None = None) -> Tensor:
        """Return the loss of one micro-batch, on a stage that holds all layers."""
        distillation = self.distillation if self.training else None
        states_TBD: list[Tensor] = []
        x_TBD = self.body(tokens_TB, document_start_BT, None if distillation is None else states_TBD)
        loss = self.loss(x_TBD, labels_TB)
        if distillation is None:
            return loss
        assert self.transformer.head is not None
        taught = distillation.loss(self.transformer.head, x_TBD, states_TBD, tokens_TB, document_start_BT)
        self.measure("distillation_loss", taught)
        return loss + taught

    def complete_statistics(self) -> StageStatistics:
        """Return the statistics with the penalties added; in training call it after the backward passes."""
        assert self.statistics is not None, "no micro-batch was run"
        for penalty in self._penalties:
            self.measure("entropy_loss", penalty())
        self._penalties = []
        return self.statistics

    def take_statistics(self) -> StageStatistics:
        """Return the complete statistics and begin new ones."""
        statistics, self.statistics = self.complete_statistics(), None
        return statistics

    def measure(self, name: str, value: Tensor) -> None:
        """Add a scalar to the statistics of this micro-batch; every name must be in `telemetry.METRICS`."""
        assert self.statistics is not None, "no micro-batch was run"
        self.statistics.add(name, value.detach().clone())

    def count(self, more: StageStatistics) -> None:
        """Add statistics to those collected so far."""
        self.statistics = more if self.statistics is None else self.statistics + more

    def _record(self, entropy_LBNT: Tensor) -> None:
        micro_batches = 0 if self.statistics is None else self.statistics.micro_batches
        rows = entropy_LBNT.shape[1] if self.valid_rows is None else self.valid_rows[micro_batches]
        self.count(StageStatistics(1, rows, entropy_LBNT[:, :rows].mean(dim=3).sum(dim=1)))


def build_transformer(
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    layers: range,
    vocab_size: int,
    seed: int,
    micro_batch_size: int,
    num_micro_batches: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Build this rank's part of the model, initialized from the seed alone.

    The order matters: shapes without memory, sharding, memory, values.

    Args:
        layers: of this rank's stage.
    """
    grid, padded = groups.grid, padded_vocab_size(vocab_size, groups.grid.tp)
    tokens_per_step = micro_batch_size * num_micro_batches * len(grid.positions(model.seq_length))
    plan = sharding_plan(model, parallel, grid.tp, tokens_per_step)
    with torch.device("meta"):
        transformer = Transformer(
            model,
            vocab_size,
            padded_vocab_size=padded,
            layers=layers,
            first=grid.is_first_stage,
            last=grid.is_last_stage,
        )
        apply_tensor_parallel(transformer, groups, plan)
        apply_context_parallel(transformer, groups)
    transformer.to(dtype).to_empty(device=device)
    transformer.tie_head()
    mark_split(transformer, plan, padded)
    transformer.initialize(seed, cut(transformer, groups))
    return transformer


def recompute_activations(transformer: Transformer, what: Literal["none", "selective", "full"]) -> None:
    """Keep fewer activations of each block; the backward pass recomputes the rest.

    'full' keeps only the block's input. 'selective' keeps the outputs of the wide matrices and recomputes what is
    cheap: attention after its queries, keys and values, and the FFN's activation. Entropies are recorded in the first
    run only.
    """
    # Nothing here is random, and a generator's state cannot be read while a CUDA graph is captured.
    again = functools.partial(functools.partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in transformer.layers.values():
        if what == "full":
            block.forward = again(block.forward)
        elif what == "selective":
            block.attention.attend = again(block.attention.attend)
            block.ffn.contract = again(block.ffn.contract)
