"""Predict the bytes that one rank sends in a step on each axis; `parallel.counting.traffic` counts them while running.

Bytes are those of ring algorithms, for n ranks and a tensor of s bytes: all-reduce 2 s (n-1)/n; reduce-scatter,
all-gather and all-to-all s (n-1)/n; point to point s.

A sum beside a product travels as a scatter and a gather, which send as many bytes as an all-reduce.

Let A be the bytes of a micro-batch's hidden states. A block then sends over tensor-parallel ranks, times (tp-1)/tp:

    attention                       4 A: an all-reduce forward, one backward
      with sequence parallelism     5 A: a gather and a scatter forward, both again backward, and the inputs gathered
                                    once more for the weights' gradients
    FFN of two matrices             as attention
    fused FFN, columns split        3 A: an all-reduce forward, a gather backward
      with sequence parallelism     2 A (1 + 1/tp): an exchange and a scatter forward, both again backward
      replicated                    0; its gradient is summed once a step

Not counted: the sums of weight and spectral normalization over a split matrix's columns, about D numbers a layer.
"""

from dataclasses import dataclass

from parallel.counting.footprint import Workload, held_elements, replicated_elements


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in a step, by axis.

    `gradients` and `weights` go to replicas. `entropy` is the average of entropies over data-parallel ranks.
    """

    tensor: float = 0.0
    context: float = 0.0
    gradients: float = 0.0
    weights: float = 0.0
    pipeline: float = 0.0
    embedding_ends: float = 0.0
    entropy: float = 0.0

    @property
    def data(self) -> float:
        """What replicas send each other."""
        return self.gradients + self.weights

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def volume(work: Workload, element_bytes: int, gradient_bytes: int) -> Volume:
    """Return what a rank of the grid's stage sends in a step.

    Args:
        element_bytes: of weights and activations.
        gradient_bytes: of the gradients averaged over replicas.
    """
    grid, model, micro_batches = work.grid, work.model, work.num_micro_batches
    hidden = work.tokens * model.hidden_size * element_bytes
    layers = len(work.layers)
    parameters = held_elements(work)
    sequence = grid.tp if work.parallel.sequence_parallel else 1
    tensor = micro_batches * (layers * block_volume(work, hidden) + _ends(work, hidden))
    exchanges = 8 + _exchanged_again(work)
    neighbours = (not grid.is_first_stage) + (not grid.is_last_stage)
    ends = grid.pp > 1 and model.tied_head and (grid.is_first_stage or grid.is_last_stage)
    vocabulary = work.padded_vocab_size // grid.tp * model.hidden_size
    own_heads = len(grid.heads(model.num_attention_heads))
    gradients, weights = _data_bytes(work, element_bytes, gradient_bytes)
    return Volume(
        tensor=tensor + 2 * _share(grid.tp) * replicated_elements(work) * element_bytes,
        context=micro_batches * layers * exchanges * _share(grid.cp) * hidden / grid.tp,
        gradients=_share(grid.replicas) * parameters * gradients,
        weights=_share(grid.replicas) * parameters * weights,
        pipeline=micro_batches * neighbours * hidden / sequence,
        embedding_ends=vocabulary * gradient_bytes if ends else 0.0,
        entropy=micro_batches * 2 * _share(grid.dp) * layers * own_heads * 4 if work.per_head else 0.0,
    )


def _exchanged_again(work: Workload) -> int:
    """Return the widths that context-parallel ranks exchange once more where activations are recomputed."""
    around_attention = work.grid.tp > 1  # else queries, keys and values are exchanged with their product
    return {"none": 0, "selective": 4 if around_attention else 1, "full": 4}[work.recompute]


def block_volume(work: Workload, hidden: float) -> float:
    """Return the bytes that one block sends over tensor-parallel ranks for one micro-batch.

    Args:
        hidden: bytes of one micro-batch's hidden states.
    """
    tp, sequence_parallel, again = work.grid.tp, work.parallel.sequence_parallel, work.recompute == "full"
    two_matrices = 5 if sequence_parallel else 4
    forward = 2  # which full recomputation repeats
    ffn: float
    ffn_forward: float
    if not work.model.fused_ffn:
        ffn, ffn_forward = two_matrices, 2
    elif not sequence_parallel:
        ffn, ffn_forward = 3, 2
    elif work.replicates_fused_ffn:
        ffn, ffn_forward = 0, 0
    else:
        ffn, ffn_forward = 2 + 2 / tp, 1 + 1 / tp
    return _share(tp) * hidden * (two_matrices + ffn + (forward + ffn_forward if again else 0))


def _ends(work: Workload, hidden: float) -> float:
    """Return the bytes that embedding and head send for one micro-batch, on the stages that have them."""
    grid, sequence_parallel = work.grid, work.parallel.sequence_parallel
    total = 0.0
    if grid.is_first_stage:
        total += (2 + sequence_parallel) * hidden  # sums of embeddings; gradients gathered from positions
    if grid.is_last_stage:
        total += 2 * hidden + 3 * 2 * 4 * work.tokens  # to and from the head; maximum, sum and label of each row
    return _share(grid.tp) * total


def _data_bytes(work: Workload, element_bytes: int, gradient_bytes: int) -> tuple[int, int]:
    """Return the bytes per parameter, before the factor (n-1)/n, of gradients and of weights that replicas exchange.

    ZeRO-1 exchanges gradients once a step, ZeRO-2 after every micro-batch. In bf16, where they are accumulated in a
    wider type, both reduce-scatter them; else they all-reduce them. Both gather weights once. ZeRO-3 reduce-scatters
    gradients and gathers weights for each forward and each backward pass. For ZeRO-3 this is an upper bound, since it
    keeps weights that it needs again soon.
    """
    micro_batches, scattered = work.num_micro_batches, gradient_bytes > element_bytes
    of_gradients = (1 if scattered else 2) * gradient_bytes
    return {
        1: (of_gradients, element_bytes),
        2: (of_gradients * micro_batches, element_bytes),
        3: (gradient_bytes * micro_batches, 2 * element_bytes * micro_batches),
    }[work.parallel.zero_stage]


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
