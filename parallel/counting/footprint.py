"""Predict what a rank holds: parameters, bytes of training state and kept activations, and the peak of a step.

The formulas describe bf16 training on GPUs with compiled blocks. Their terms come from the tensors that were kept for
the backward pass on one GPU. What ZeRO 2 and 3 hold follows DeepSpeed's design.

Symbols: t tokens of a micro-batch on this rank, D model width, F FFN width, N heads.
"""

import dataclasses
import functools
from dataclasses import dataclass

from model.config import ModelConfig
from model.cross_entropy import CHUNK_BYTES
from model.initialize import TIED_HEAD_SOURCE
from model.transformer import global_shapes
from parallel.config import ParallelConfig, padded_vocab_size
from parallel.grid import RankGrid
from parallel.sharding.plan import ShardingPlan, sharding_plan
from parallel.stages import stage_layers

ELEMENT_BYTES = 2  # bfloat16
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4  # float32: weight, Adam's two moments, accumulated gradient
LOGITS_AT_ONCE = 3.1  # copies of one chunk's logits alive at the peak of the cross-entropy
BACKWARD_WIDTHS = 6  # gradients of width D a token, alive while one block runs backward


@dataclass(frozen=True)
class Workload:
    """A model, its layout, and the batches of a step.

    Attributes:
        grid: with this rank's place in it.
        vocab_size: without padding.
        recompute: activation recomputation: none, selective or full.
        per_head: whether the regularizer averages entropies over replicas.
        cuda_graphs: whether passes are replayed as CUDA graphs wherever they can be.
    """

    model: ModelConfig
    parallel: ParallelConfig
    grid: RankGrid
    vocab_size: int
    micro_batch_size: int
    num_micro_batches: int
    recompute: str = "none"
    per_head: bool = False
    cuda_graphs: bool = True

    @property
    def tokens(self) -> int:
        """t, the tokens of one micro-batch on a rank."""
        return self.micro_batch_size * self.model.seq_length // self.grid.cp

    @functools.cached_property
    def layers(self) -> range:
        """The layers of this rank's stage."""
        return stage_layers(self.model, self.vocab_size, self.grid.pp, self.recompute)[self.grid.stage]

    @functools.cached_property
    def plan(self) -> ShardingPlan:
        """How tensor-parallel ranks hold each parameter."""
        return sharding_plan(self.model, self.parallel, self.grid.tp, self.tokens * self.num_micro_batches)

    @property
    def replicates_fused_ffn(self) -> bool:
        """Whether every tensor-parallel rank holds a fused FFN whole."""
        return self.plan.replicates_fused_ffn

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the whole embedding."""
        return padded_vocab_size(self.vocab_size, self.grid.tp)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest rank of one stage.

    Attributes:
        parameters: elements, not bytes.
        weights: in bf16.
        gradients: accumulated over micro-batches.
        optimizer: float32 masters and Adam's moments.
        activations: of all micro-batches in flight.
        loss: logits and gradients while the cross-entropy runs; 0 on all but the last stage.
        backward: extra while one block runs backward.
        waiting: activations of the other micro-batches in flight, after one has run backward.
        micro_batch_gradients: of one micro-batch in bf16, until ZeRO-1 adds them to `gradients`.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    backward: int
    waiting: int
    micro_batch_gradients: int

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment: at the start of a backward pass or at its end."""
        start = self.activations + max(self.loss, self.backward)
        end = self.waiting + self.backward + self.micro_batch_gradients
        return self.weights + self.gradients + self.optimizer + max(start, end)


@dataclass(frozen=True)
class Held:
    """A kind of parameter that a rank holds, once or in each of its layers.

    Attributes:
        size: elements of one on this rank, before ZeRO-3.
        copies: how many.
        has_partial_gradient: whether gradients are summed over tensor-parallel ranks once a step.
    """

    size: int
    copies: int
    has_partial_gradient: bool

    @property
    def elements(self) -> int:
        return self.size * self.copies


def held_parameters(work: Workload) -> dict[str, Held]:
    """Return what a rank of the grid's stage holds, by global name; that of layer 0 stands for all layers."""
    grid = work.grid
    copies = {"embedding": int(grid.is_first_stage), "head": int(grid.is_last_stage), "layers": len(work.layers)}
    return _held(work.model, work.padded_vocab_size, work.plan, tuple(copies.items()), grid.pp > 1)


@functools.lru_cache(maxsize=1 << 12)
def _held(
    model: ModelConfig,
    padded_vocab_size: int,
    plan: ShardingPlan,
    copies: tuple[tuple[str, int], ...],
    copies_tied: bool,
) -> dict[str, Held]:
    sizes, times = dict(_sizes(model, padded_vocab_size)), dict(copies)
    if model.tied_head and copies_tied:
        sizes["head.weight"] = sizes[TIED_HEAD_SOURCE]
    return {
        name: Held(
            size if plan.split_dim(name) is None else size // plan.tp,
            times[name.partition(".")[0]],
            plan.has_partial_gradient(name),
        )
        for name, size in sizes.items()
        if times[name.partition(".")[0]]
    }


@functools.lru_cache
def _sizes(model: ModelConfig, padded_vocab_size: int) -> dict[str, int]:
    """Return the elements of every parameter outside the layers, and in layer 0."""
    one_layer = dataclasses.replace(model, num_layers=1)
    return {name: shape.numel() for name, shape in global_shapes(one_layer, padded_vocab_size).items()}


def held_elements(work: Workload) -> int:
    """Return the elements of all parameters that a rank of the grid's stage holds, before ZeRO-3."""
    return sum(held.elements for held in held_parameters(work).values())


def replicated_elements(work: Workload) -> int:
    """Return the elements of parameters whose gradients are summed over tensor-parallel ranks once a step."""
    return sum(held.elements for held in held_parameters(work).values() if held.has_partial_gradient)


def footprint(work: Workload) -> Footprint:
    """Return what a rank of the grid's stage holds during a step."""
    grid, stage = work.grid, work.parallel.zero_stage
    parameters = held_elements(work)
    replicas = grid.replicas
    gradients = {1: GRADIENT_BYTES * parameters, 2: (ELEMENT_BYTES + GRADIENT_BYTES) * parameters // replicas}
    in_flight = min(work.num_micro_batches, grid.pp - grid.stage)
    layers = len(work.layers)
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
        micro_batch_gradients=ELEMENT_BYTES * parameters if stage == 1 else 0,
    )


def block_bytes(work: Workload, recompute: str) -> int:
    """Return the bytes that one block keeps of one micro-batch for its backward pass."""
    model, grid = work.model, work.grid
    whole = 1 / grid.tp if work.parallel.sequence_parallel else 1.0  # share of what only sequence parallelism splits
    split = 1 / grid.tp
    if recompute == "full":
        return round(whole * work.tokens * model.hidden_size * ELEMENT_BYTES)
    widths = 2 * whole + 3 * split  # the block's input, the FFN's, and query, key and value
    if model.norm != "none":
        widths += 2 * whole  # the norms' outputs
    ffn = model.ffn_width / model.hidden_size
    if not model.fused_ffn:
        widths += ffn * split  # the first matrix's output
    elif not work.replicates_fused_ffn:
        widths += split - whole  # it keeps its own columns of the input only
    formed = 0  # the matrix of the product, if it is not the weight itself
    if model.ffn_holds_residual or (model.scaled_ffn and (model.fused_ffn or recompute == "none")):
        whole_fused = model.fused_ffn and work.replicates_fused_ffn
        rows = model.hidden_size if model.fused_ffn else ffn * model.hidden_size
        formed = round(rows * model.hidden_size * ELEMENT_BYTES * (1 if whole_fused else split))
    statistics = 0
    if recompute == "none":
        widths += (1 + (grid.cp > 1)) * split  # attention's output, exchanged under context parallelism
        widths += 0 if model.activation in ("relu", "identity") else ffn * split  # an activation's input
        statistics = 8 * work.tokens * model.num_attention_heads // grid.tp  # each row's entropy and log-sum-exp
    return round(widths * work.tokens * model.hidden_size * ELEMENT_BYTES) + formed + statistics


def _penalty_bytes(work: Workload) -> int:
    """Return the bytes that the penalty keeps of a layer: float32 entropies, and a mask of those beyond the margin."""
    each = 4 + (1 if work.model.regularized and not work.per_head else 0)
    return each * work.tokens * work.model.num_attention_heads // work.grid.tp


def _hidden_bytes(work: Workload) -> int:
    return work.tokens * work.model.hidden_size * ELEMENT_BYTES


def _loss_bytes(work: Workload) -> int:
    """Return the bytes of the gradients of hidden states and head, and of one chunk's logits."""
    rows = work.padded_vocab_size // work.grid.tp
    chunks = -(-work.tokens // max(1, CHUNK_BYTES // (ELEMENT_BYTES * rows)))
    logits = -(-work.tokens // chunks) * rows * ELEMENT_BYTES
    gathered = work.grid.tp > 1 and work.parallel.sequence_parallel  # the head's input, all positions
    return round((1 + gathered) * _hidden_bytes(work) + 4 * rows * work.model.hidden_size + LOGITS_AT_ONCE * logits)
