"""Configuration of how a model is laid out over ranks, and the faults that a layout can have."""

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig, explained
from parallel.grid import RankGrid

SHORT_BLOCK_FLOPS = 2e12
"""A block's forward and backward pass of one micro-batch, about 3 ms on an H100. A host may launch it more slowly."""
VOCAB_MULTIPLE = 128
"""Rows of each rank's vocabulary shard are a multiple of this, which makes matrix products fastest."""


LEAST_BUCKET, LEAST_BUCKET_PER_REPLICA = 40_000_000, 1_000_000
"""Elements. With many replicas each message of a ring is a small part of a bucket, and latency would count. These are
megatron-core's defaults (megatron/core/distributed/distributed_data_parallel.py)."""


def least_bucket_elements(replicas: int) -> int:
    """Return the elements from which on a bucket of layers, whose gradients are exchanged together, is large enough."""
    return max(LEAST_BUCKET, LEAST_BUCKET_PER_REPLICA * replicas)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Round the vocabulary up so that every tensor-parallel rank holds a multiple of 128 rows."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes. The data-parallel size is the world size divided by the others."""

    tensor_parallel_size: int = explained(1, "Ranks that split each layer by heads. Keep them within one node.")
    pipeline_parallel_size: int = explained(
        1, "Pipeline stages. Each holds a contiguous range of layers; the last, which computes the head, holds fewer."
    )
    context_parallel_size: int = explained(
        1,
        "Ranks that split each sequence by position, for long contexts. Attention exchanges positions for heads "
        "(Ulysses), so tp * cp must divide the number of heads.",
    )
    sequence_parallel: bool = explained(
        False,
        "Split activations outside the tensor-parallel regions by position. They take 1/tp of the memory at the same "
        "traffic.",
    )
    zero_stage: Literal[1, 2, 3] = explained(
        1,
        "What ZeRO shards over data-parallel ranks: 1 the optimizer state, 2 also gradients, 3 also parameters. 2 and "
        "3 need pipeline_parallel_size = 1.",
    )

    fused_ffn: Literal["auto", "replicated", "split"] = explained(
        "auto",
        "How a fused FFN is laid out under sequence parallelism. 'replicated' has no activation traffic and tp times "
        "the memory; 'split' divides it over tensor-parallel ranks; 'auto' takes whichever sends fewer bytes. Without "
        "sequence parallelism it is always split.",
    )
    replica_check_interval: int = explained(
        0, "Steps between checks that all copies of a parameter are identical to the last bit; 0 means none."
    )

    @property
    def ranks_per_batch(self) -> int:
        """The number of ranks that work on the same sequences."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    def replays_passes(self, data_parallel_size: int, per_head: bool, block_flops: float) -> bool:
        """Return whether training passes should be replayed as CUDA graphs, if they are wanted and there is a GPU.

        What outlives a pass cannot be captured: the activations of a pipeline's other micro-batches, the weights that
        ZeRO-3 gathers, the entropies that data-parallel ranks average between the forward and the backward pass. Passes
        with NCCL's calls hung when they were captured, so tensor-parallel passes are not. Context-parallel exchanges
        between GPUs of one host use no NCCL and are captured (`parallel.sharding.transport`).

        A replayed pass hands over all gradients at its end, so nothing of their exchange over replicas is hidden behind
        it. With replicas, only short passes are replayed, which the host would hold up otherwise.

        Args:
            data_parallel_size: ranks that hold other sequences.
            per_head: whether the regularizer averages entropies over data-parallel ranks.
            block_flops: of one rank, for one block's forward and backward pass of one micro-batch.
        """
        sizes = self.tensor_parallel_size, self.pipeline_parallel_size
        possible = max(sizes) == self.zero_stage == 1 and not (per_head and data_parallel_size > 1)
        has_replicas = data_parallel_size * self.context_parallel_size > 1
        return possible and (not has_replicas or block_flops < SHORT_BLOCK_FLOPS)

    def replicates_fused_ffn(self, hidden_size: int, tokens_per_step: int) -> bool:
        """Return whether every tensor-parallel rank keeps a fused FFN whole.

        'auto' takes the form that sends fewer elements a rank and step, for width D and t tokens:

            whole    2 (tp-1)/tp D^2             one all-reduce of the gradient
            split    2 (tp-1)/tp (1 + 1/tp) D t  a reduce-scatter and an all-to-all of activations, forward and backward

        Args:
            hidden_size: D.
            tokens_per_step: t, tokens of one replica over all its micro-batches.
        """
        if not self.sequence_parallel or self.fused_ffn == "split":
            return False
        cheaper = hidden_size < (1 + 1 / self.tensor_parallel_size) * tokens_per_step
        return cheaper or self.fused_ffn == "replicated"

    def grid(self, world_size: int, rank: int = 0) -> RankGrid:
        """Return the place of a rank among `world_size` processes."""
        return RankGrid(
            tp=self.tensor_parallel_size,
            pp=self.pipeline_parallel_size,
            dp=world_size // self.ranks_per_batch,
            cp=self.context_parallel_size,
            rank=rank,
        )

    def world_faults(self, world_size: int) -> list[str]:
        """Return why the layout does not fit the number of processes; empty if it does."""
        ranks = self.ranks_per_batch
        if world_size % ranks == 0:
            return []
        names = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
        sizes = {name: getattr(self, name) for name in names}
        product = " * ".join(f"{name}({size})" for name, size in sizes.items() if size > 1)
        return [
            f"the world size {world_size} is not a multiple of {product} = {ranks}; launch a multiple of {ranks} "
            f"processes (deepspeed --num_gpus {ranks} ...) or change the sizes"
        ]

    def faults(self, model: ModelConfig) -> list[str]:
        """Return every reason why `model` cannot be laid out this way, each with its numbers and its remedy."""
        faults = [
            f"parallel.{name} = {getattr(self, name)} must be at least {least}"
            for name, least in (
                ("tensor_parallel_size", 1),
                ("pipeline_parallel_size", 1),
                ("context_parallel_size", 1),
                ("replica_check_interval", 0),
            )
            if getattr(self, name) < least
        ]
        return faults or [*self._size_faults(model), *self._combination_faults(model)]

    def _size_faults(self, model: ModelConfig) -> list[str]:
        """Return sizes that the axes do not divide."""
        tp, pp, cp = self.tensor_parallel_size, self.pipeline_parallel_size, self.context_parallel_size
        faults = []
        if model.num_attention_heads % tp:
            faults.append(
                f"model.num_attention_heads = {model.num_attention_heads} is not a multiple of "
                f"parallel.tensor_parallel_size = {tp}; heads are split over those ranks, so change one of them"
            )
        elif model.num_attention_heads < tp * cp:
            faults.append(
                f"model.num_attention_heads = {model.num_attention_heads} is less than parallel.tensor_parallel_size"
                f"({tp}) * parallel.context_parallel_size({cp}) = {tp * cp}; attention gives each of those ranks whole "
                f"heads, so at most {model.num_attention_heads} ranks can share a sequence: lower one of the sizes"
            )
        elif model.num_attention_heads % (tp * cp):
            faults.append(
                f"model.num_attention_heads = {model.num_attention_heads} is not a multiple of "
                f"parallel.tensor_parallel_size({tp}) * parallel.context_parallel_size({cp}) = {tp * cp}; attention "
                "splits heads over those ranks, so change one of them"
            )
        if model.seq_length % cp:
            faults.append(
                f"model.seq_length = {model.seq_length} is not a multiple of parallel.context_parallel_size = {cp}; "
                "positions are split over those ranks, so change one of them"
            )
        if model.hidden_size % tp:
            faults.append(
                f"model.hidden_size = {model.hidden_size} is not a multiple of parallel.tensor_parallel_size = {tp}"
            )
        if not model.fused_ffn and model.ffn_hidden_size is not None and model.ffn_hidden_size % tp:
            faults.append(
                f"model.ffn_hidden_size = {model.ffn_hidden_size} is not a multiple of parallel.tensor_parallel_size "
                f"= {tp}"
            )
        if pp > model.num_layers:
            faults.append(
                f"parallel.pipeline_parallel_size = {pp} exceeds model.num_layers = {model.num_layers}; every stage "
                "needs at least one layer"
            )
        if self.sequence_parallel and model.seq_length % cp == 0 and model.seq_length // cp % tp:
            over = f"over parallel.context_parallel_size({cp}) " if cp > 1 else ""
            faults.append(
                f"model.seq_length = {model.seq_length} {over}is not a multiple of parallel.tensor_parallel_size = "
                f"{tp}, which parallel.sequence_parallel needs"
            )
        return faults

    def _combination_faults(self, model: ModelConfig) -> list[str]:
        """Return options that exclude each other."""
        faults = []
        if self.zero_stage > 1 and self.pipeline_parallel_size > 1:
            faults.append(
                f"parallel.zero_stage = {self.zero_stage} needs parallel.pipeline_parallel_size = 1, not "
                f"{self.pipeline_parallel_size}: gradients must stay whole until a stage has run all micro-batches; "
                "use zero_stage = 1"
            )
        if self.zero_stage == 3 and model.spectral_norm != "none":
            faults.append(
                "parallel.zero_stage = 3 cannot be combined with model.spectral_norm: its power iteration needs whole "
                "weights between steps; use zero_stage = 1 or 2"
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            faults.append(
                "parallel.sequence_parallel = true needs parallel.tensor_parallel_size > 1: it splits over those ranks"
            )
        if self.fused_ffn != "auto" and not (self.sequence_parallel and model.fused_ffn):
            faults.append(
                f"parallel.fused_ffn = {self.fused_ffn!r} needs parallel.sequence_parallel = true and a fused FFN; "
                "leave it at 'auto'"
            )
        return faults
