"""What a rank holds, by counting: parameters, and bytes of training state, kept activations and the peak around them.

Counts are those of bf16 training on GPUs with compiled blocks. The terms were read off tensors kept for the backward
pass on one GPU; what ZeRO 2 and 3 hold follows DeepSpeed's design.

Symbols: t tokens of a micro-batch on this rank, D model width, F FFN width, N heads.
"""

import functools
from dataclasses import dataclass

from model.config import ModelConfig
from model.cross_entropy import CHUNK_BYTES
from model.initialize import TIED_HEAD_SOURCE, global_shapes
from parallel.config import ParallelConfig, padded_vocab_size
from parallel.grid import RankGrid
from parallel.sharding.plan import ShardingPlan, sharding_plan

ELEMENT_BYTES = 2  # bfloat16
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4  # float32: weight, Adam's two moments, accumulated gradient
LOGITS_AT_ONCE = 3.1  # copies of one chunk's logits alive at the peak of the cross-entropy
BACKWARD_WIDTHS = 6  # gradients of width D a token, alive while one block runs backward


@dataclass(frozen=True)
class Workload:
    """A model, how it is laid out, and what a step feeds it."""

    model: ModelConfig
    parallel: ParallelConfig
    grid: RankGrid
    vocab_size: int
    micro_batch_size: int
    num_micro_batches: int
    recompute: str = "none"
    per_head: bool = False
    cuda_graphs: bool = True  # wherever passes can be replayed

    @property
    def tokens(self) -> int:
        """t: tokens of one micro-batch on a rank."""
        return self.micro_batch_size * self.model.seq_length // self.grid.cp

    @property
    def plan(self) -> ShardingPlan:
        return sharding_plan(self.model, self.parallel, self.grid.tp, self.tokens * self.num_micro_batches)

    @property
    def replicates_fused_ffn(self) -> bool:
        return self.plan.replicates_fused_ffn

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size, self.grid.tp)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the fullest rank of one stage."""

    parameters: int  # elements
    weights: int
    gradients: int
    optimizer: int
    activations: int  # of all micro-batches in flight
    loss: int  # logits and gradients while the cross-entropy runs; the last stage has it
    backward: int  # while one block runs backward
    waiting: int  # of the other micro-batches in flight, when one has run backward
    taken_up: int  # gradients of one micro-batch in bf16, which ZeRO-1 takes up when it has run backward

    @property
    def peak(self) -> int:
        begins, ends = self.activations + max(self.loss, self.backward), self.waiting + self.backward + self.taken_up
        return self.weights + self.gradients + self.optimizer + max(begins, ends)


@functools.lru_cache(maxsize=1 << 14)
def held_parameters(work: Workload) -> dict[str, int]:
    """Elements of each parameter that a rank of the grid's stage holds, by global name; ZeRO-3 is left out."""
    grid, model = work.grid, work.model
    layers = {str(layer) for layer in grid.layers(model.num_layers)}
    ends = {"embedding": grid.is_first_stage, "head": grid.is_last_stage}
    sizes, plan = dict(_whole_sizes(model, work.padded_vocab_size)), work.plan
    if model.tied_head and grid.pp > 1:
        sizes["head.weight"] = sizes[TIED_HEAD_SOURCE]
    held = {}
    for name, size in sizes.items():
        part, _, rest = name.partition(".")
        if ends.get(part, rest.split(".")[0] in layers):
            held[name] = size if plan.split_dim(name) is None else size // grid.tp
    return held


@functools.lru_cache
def _whole_sizes(model: ModelConfig, padded_vocab_size: int) -> dict[str, int]:
    return {name: shape.numel() for name, shape in global_shapes(model, padded_vocab_size).items()}


def replicated_elements(work: Workload) -> int:
    """Elements of what every tensor-parallel rank holds but sees only in part: its gradient is summed once a step."""
    plan = work.plan
    return sum(size for name, size in held_parameters(work).items() if plan.has_partial_gradient(name))


def footprint(work: Workload) -> Footprint:
    """What a rank of the grid's stage holds at the peak of a step."""
    grid, stage = work.grid, work.parallel.zero_stage
    parameters = sum(held_parameters(work).values())
    replicas = grid.replicas
    gradients = {1: GRADIENT_BYTES * parameters, 2: (ELEMENT_BYTES + GRADIENT_BYTES) * parameters // replicas}
    in_flight = min(work.num_micro_batches, grid.pp - grid.stage)
    layers = len(grid.layers(work.model.num_layers))
    whole_block, kept_block = block_bytes(work, "none"), block_bytes(work, work.recompute)
    rerun = whole_block - kept_block if work.recompute != "none" else 0
    activations = layers * (kept_block + _penalty_bytes(work)) + _hidden_bytes(work)
    return Footprint(
        parameters=parameters,
        weights=ELEMENT_BYTES * parameters // (replicas if stage == 3 else 1),
        gradients=gradients.get(stage, gradients[2]),
        optimizer=(MASTER_BYTES + MOMENT_BYTES) * parameters // replicas,
        activations=in_flight * activations,
        loss=_loss_bytes(work) if grid.is_last_stage else 0,
        backward=rerun + BACKWARD_WIDTHS * _hidden_bytes(work),
        waiting=(in_flight - 1) * activations,
        taken_up=ELEMENT_BYTES * parameters if stage == 1 else 0,
    )


def block_bytes(work: Workload, recompute: str) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass."""
    model, grid = work.model, work.grid
    whole = 1 / grid.tp if work.parallel.sequence_parallel else 1.0  # of widths that only sequence parallelism splits
    split = 1 / grid.tp
    if recompute == "full":
        return round(whole * work.tokens * model.hidden_size * ELEMENT_BYTES)
    widths = 2 * whole + 3 * split  # the block's input, the FFN's, and query, key and value
    if model.norm == "layernorm":
        widths += 2 * whole  # what the norms give
    ffn = (model.ffn_hidden_size or 4 * model.hidden_size) / model.hidden_size
    if not model.fused_ffn:
        widths += ffn * split  # the first matrix's output
    elif not work.replicates_fused_ffn:
        widths += split - whole  # its columns of what it multiplies, not the whole
    formed = 0  # the matrix that is multiplied by, where it is not the weight itself
    if model.ffn_holds_residual or (model.scaled_ffn and (model.fused_ffn or recompute == "none")):
        whole_fused = model.fused_ffn and work.replicates_fused_ffn
        rows = model.hidden_size if model.fused_ffn else ffn * model.hidden_size
        formed = round(rows * model.hidden_size * ELEMENT_BYTES * (1 if whole_fused else split))
    statistics = 0
    if recompute == "none":
        widths += (1 + (grid.cp > 1)) * split  # attention's output, exchanged under context parallelism
        widths += ffn * split if model.activation == "gelu" else 0
        statistics = 8 * work.tokens * model.num_attention_heads // grid.tp  # entropy and logarithm of each row's sum
    return round(widths * work.tokens * model.hidden_size * ELEMENT_BYTES) + formed + statistics


def _penalty_bytes(work: Workload) -> int:
    """Entropies of a layer once more, float32, and which of them are beyond the margin."""
    each = 4 + (1 if work.model.regularized and not work.per_head else 0)
    return each * work.tokens * work.model.num_attention_heads // work.grid.tp


def _hidden_bytes(work: Workload) -> int:
    return work.tokens * work.model.hidden_size * ELEMENT_BYTES


def _loss_bytes(work: Workload) -> int:
    """Gradients of hidden states and head, and one chunk's logits."""
    rows = work.padded_vocab_size // work.grid.tp
    chunks = -(-work.tokens // max(1, CHUNK_BYTES // (ELEMENT_BYTES * rows)))
    logits = -(-work.tokens // chunks) * rows * ELEMENT_BYTES
    entered = work.grid.tp > 1 and work.parallel.sequence_parallel  # gathered positions
    return round((1 + entered) * _hidden_bytes(work) + 4 * rows * work.model.hidden_size + LOGITS_AT_ONCE * logits)
