"""Bytes that one rank sends in a step on each axis, by counting; `parallel.counting.traffic` counts the same while
running.

Under ring algorithms over n ranks and a tensor of s bytes: all-reduce 2 s (n-1)/n; reduce-scatter, all-gather and
all-to-all s (n-1)/n; point to point s. With A the bytes of all hidden states of a micro-batch, and every factor times
(tp-1)/tp, a block moves over tensor-parallel ranks

    attention                       4 A: an all-reduce forward, one backward
      with sequence parallelism     5 A: gather and scatter forward, their like backward, inputs gathered again for
      weights
    FFN of two matrices             as attention
    fused FFN, columns split        3 A: an all-reduce forward, a gather backward
      with sequence parallelism     2 A (1 + 1/tp): an exchange and a scatter forward, their like backward
      replicated                    0, and its gradient summed once a step

Left out: what weight and spectral normalization sum over the columns of a split matrix, some D numbers a layer.
"""

from dataclasses import dataclass

from parallel.counting.footprint import Workload, held_parameters, replicated_elements


@dataclass(frozen=True)
class Volume:
    """Bytes sent in a step."""

    tensor: float = 0.0
    context: float = 0.0
    data: float = 0.0
    pipeline: float = 0.0
    embedding_ends: float = 0.0
    entropy: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def volume(work: Workload, element_bytes: int, gradient_bytes: int) -> Volume:
    """What a rank of the grid's stage sends.

    Args:
        element_bytes: of weights and activations.
        gradient_bytes: of the gradients that replicas average.
    """
    grid, model, micro_batches = work.grid, work.model, work.num_micro_batches
    hidden = work.tokens * model.hidden_size * element_bytes
    layers = len(grid.layers(model.num_layers))
    parameters = sum(held_parameters(work).values())
    sequence = grid.tp if work.parallel.sequence_parallel else 1
    tensor = micro_batches * (layers * block_volume(work, hidden) + _ends(work, hidden))
    exchanges = 8 + (4 if work.recompute != "none" else 0)
    neighbours = (not grid.is_first_stage) + (not grid.is_last_stage)
    ends = grid.pp > 1 and model.tied_head and (grid.is_first_stage or grid.is_last_stage)
    vocabulary = work.padded_vocab_size // grid.tp * model.hidden_size
    own_heads = len(grid.heads(model.num_attention_heads))
    return Volume(
        tensor=tensor + 2 * _share(grid.tp) * replicated_elements(work) * element_bytes,
        context=micro_batches * layers * exchanges * _share(grid.cp) * hidden / grid.tp,
        data=_share(grid.replicas) * parameters * _data_bytes(work, element_bytes, gradient_bytes),
        pipeline=micro_batches * neighbours * hidden / sequence,
        embedding_ends=vocabulary * gradient_bytes if ends else 0.0,
        entropy=micro_batches * 2 * _share(grid.dp) * layers * own_heads * 4 if work.per_head else 0.0,
    )


def block_volume(work: Workload, hidden: float) -> float:
    """Bytes that one block sends over tensor-parallel ranks for one micro-batch, `hidden` bytes of activations."""
    tp, sequence_parallel, again = work.grid.tp, work.parallel.sequence_parallel, work.recompute == "full"
    two_matrices = 5 if sequence_parallel else 4
    # what is repeated where the block is recomputed: until all is there that was kept, before the FFN's last sum
    forward = 2
    ffn: float
    ffn_forward: float
    if not work.model.fused_ffn:
        ffn, ffn_forward = two_matrices, int(sequence_parallel)
    elif not sequence_parallel:
        ffn, ffn_forward = 3, 0
    elif work.replicates_fused_ffn:
        ffn, ffn_forward = 0, 0
    else:
        ffn, ffn_forward = 2 + 2 / tp, 1 / tp
    return _share(tp) * hidden * (two_matrices + ffn + (forward + ffn_forward if again else 0))


def _ends(work: Workload, hidden: float) -> float:
    """Embedding and head, of the stages that have them, for one micro-batch."""
    grid, sequence_parallel = work.grid, work.parallel.sequence_parallel
    total = 0.0
    if grid.is_first_stage:
        total += (2 + sequence_parallel) * hidden  # sums of embeddings; gradients gathered from positions
    if grid.is_last_stage:
        total += 2 * hidden + 3 * 2 * 4 * work.tokens  # to and from the head; maximum, sum and label of each row
    return _share(grid.tp) * total


def _data_bytes(work: Workload, element_bytes: int, gradient_bytes: int) -> int:
    """Bytes a parameter, times (n-1)/n, that replicas exchange in a step.

    ZeRO-1 and 2 all-reduce gradients, 2 each micro-batch, and gather weights; in bf16 ZeRO-1 scatters gradients, which
    it sums in a wider type. ZeRO-3 scatters gradients and gathers weights for each forward and each backward pass, at
    most: it keeps what it soon needs again.
    """
    micro_batches = work.num_micro_batches
    scattered = gradient_bytes > element_bytes
    return {
        1: (1 if scattered else 2) * gradient_bytes + element_bytes,
        2: 2 * gradient_bytes * micro_batches + element_bytes,
        3: (gradient_bytes + 2 * element_bytes) * micro_batches,
    }[work.parallel.zero_stage]


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
