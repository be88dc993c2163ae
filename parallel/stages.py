"""Divides the layers of a model over pipeline stages, so that no stage waits long for another."""

import functools

from model.config import ModelConfig


@functools.lru_cache(maxsize=1 << 10)
def stage_layers(model: ModelConfig, vocab_size: int, pp: int, recompute: str = "none") -> tuple[range, ...]:
    """Return the layers of each pipeline stage: contiguous ranges, each with at least one layer.

    The last stage also computes the head, so it gets fewer layers: as many as keep the slowest stage fastest, by FLOPs.
    The other stages share the rest evenly. Where a choice is free, later stages get more, since earlier ones hold more
    micro-batches in flight. The embedding is a lookup and costs nothing.

    28 layers and a head of 2.1 layers on 2 stages give 15 and 13; on 4 stages they give 7, 8, 8 and 5.

    Args:
        model: resolved.
        vocab_size: without padding.
        pp: pipeline stages, at most as many as layers.
        recompute: activation recomputation: none, selective or full.
    """
    layers = model.num_layers
    assert 1 <= pp <= layers, (pp, layers)
    if pp == 1:
        return (range(layers),)
    head = head_flops(model, vocab_size) / block_flops(model, recompute)

    def slowest(last: int) -> float:
        """Return the cost of the slowest stage, in layers, if the last holds `last` of them."""
        return max(-(-(layers - last) // (pp - 1)), last + head)

    last = min(range(layers - pp + 1, 0, -1), key=slowest)
    others, more = divmod(layers - last, pp - 1)
    sizes = [others + (stage >= pp - 1 - more) for stage in range(pp - 1)] + [last]
    return tuple(range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(pp))


def block_flops(model: ModelConfig, recompute: str) -> int:
    """Count the FLOPs of one block for one token, forward and backward.

    A product costs its forward pass twice more in the backward pass. Attention costs 2.5 times more, since its kernels
    compute the scores again. Under the causal mask its forward pass takes 2 T D FLOPs.
    """
    products, attention = 2 * model.block_matrix_elements, 2 * model.seq_length * model.hidden_size
    again = {"none": 0, "selective": attention, "full": products + attention}[recompute]
    return 3 * products + 7 * attention // 2 + again


def head_flops(model: ModelConfig, vocab_size: int) -> int:
    """Count the FLOPs of the head for one token, forward and backward."""
    return 6 * model.hidden_size * vocab_size
