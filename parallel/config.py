"""How a model is laid out over ranks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import ModelConfig

VOCAB_MULTIPLE = 128
"""Rows of each rank's vocabulary shard come in multiples of this, since matrix products are fastest so."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _explained(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; the data-parallel size is what remains of the world."""

    tensor_parallel_size: int = _explained(1, "Ranks that share each layer, split by heads; keep it within one node.")
    pipeline_parallel_size: int = _explained(1, "Stages that share the layers; each holds a contiguous range of them.")
    sequence_parallel: bool = _explained(
        False, "Split activations between the tensor-parallel regions by position: 1/tp of their memory, same traffic."
    )
    zero_stage: Literal[1, 2, 3] = _explained(
        1,
        "What ZeRO shards over data-parallel ranks: 1 optimizer state, 2 gradients too, 3 parameters too (2 and 3 "
        "need pp=1).",
    )

    def faults(self, model: ModelConfig) -> list[str]:
        """Every reason why `model` cannot be laid out so, each with the numbers and the remedy."""
        tp, pp = self.tensor_parallel_size, self.pipeline_parallel_size
        faults = [
            f"parallel.{name} = {getattr(self, name)} must be at least 1"
            for name in ("tensor_parallel_size", "pipeline_parallel_size")
            if getattr(self, name) < 1
        ]
        if faults:
            return faults
        if model.num_attention_heads % tp:
            faults.append(
                f"model.num_attention_heads = {model.num_attention_heads} is not a multiple of "
                f"parallel.tensor_parallel_size = {tp}; heads are split over those ranks, so change one of them"
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
                f"needs "
                "at least one layer"
            )
        if self.zero_stage > 1 and pp > 1:
            faults.append(
                f"parallel.zero_stage = {self.zero_stage} needs parallel.pipeline_parallel_size = 1, not {pp}: "
                f"gradients "
                "must stay whole until a stage has run all micro-batches; use zero_stage = 1"
            )
        if self.zero_stage == 3 and model.spectral_norm != "none":
            faults.append(
                "parallel.zero_stage = 3 cannot be combined with model.spectral_norm: its power iteration needs "
                "whole weights "
                "between steps; use zero_stage = 1 or 2"
            )
        if self.sequence_parallel and tp == 1:
            faults.append(
                "parallel.sequence_parallel = true needs parallel.tensor_parallel_size > 1: it splits over those ranks"
            )
        if self.sequence_parallel and model.seq_length % tp:
            faults.append(
                f"model.seq_length = {model.seq_length} is not a multiple of parallel.tensor_parallel_size = {tp}, "
                f"which "
                "parallel.sequence_parallel needs"
            )
        return faults
