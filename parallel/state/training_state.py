"""Training state under global parameter names, independent of the layout that holds it.

Tensor parallelism makes a rank's tensor a slice of the whole. ZeRO flattens that slice and keeps one contiguous piece
of its float32 master copy and Adam moments on each data-parallel rank. A `Piece` describes ZeRO's cut, and
`parallel.state.chunks` turns it into rectangles of the whole:

    whole [rows, columns]  --tensor parallel-->  local shard  --flatten, ZeRO-->  piece [start, start + length)

    model.NAME, exp_avg.NAME, exp_avg_sq.NAME    float32, shapes of the whole model without vocabulary padding
    buffer.NAME                                  scales of tapered norms
    buffer.tp0of2.NAME                           power-iteration vectors of one tensor-parallel rank

The chunks that all ranks save cover every tensor exactly once: if several ranks hold a part, one of them saves it.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.initialize import TIED_HEAD_SOURCE, named_parameters
from model.normalized_weights import start_spectral_norms
from model.transformer import global_shapes
from parallel.deepspeed_internals import (
    adam,
    flat_masters,
    fragment,
    is_partitioned,
    partition,
    partition_state,
    whole_shape,
)
from parallel.sharding.megatron import Groups
from parallel.state.chunks import Chunk, chunks_of_range, is_of_shard, whole_chunk

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Piece:
    """Views of this rank's piece of one parameter's master copy and Adam moments.

    Attributes:
        start: the piece's first element in the flattened local tensor.
        master: float32, [length].
        moments: 'exp_avg' and 'exp_avg_sq', each [length].
    """

    start: int
    master: Tensor
    moments: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the prefix under which they are saved."""
        return {"model": self.master, **self.moments}


class StateMap:
    """Maps a stage's tensors to the whole model.

    Args:
        stage: of this rank.
        groups: of this rank.
        vocab_size: without padding.
    """

    def __init__(self, stage: nn.Module, groups: Groups, vocab_size: int) -> None:
        self.stage, self.groups = stage, groups
        self._shapes = global_shapes(stage.transformer.config, vocab_size)

    def saved_chunks(self, optimizer: torch.optim.Optimizer) -> list[Chunk]:
        """Return the chunks that this rank saves in a checkpoint, as views of the live state."""
        chunks: list[Chunk] = []
        for name, parameter in named_parameters(self.stage.transformer):
            if not self._saved_elsewhere(name, parameter):
                chunks += self._piece_chunks(name, parameter, piece_of(parameter, optimizer, self.groups))
        if self.groups.grid.replica == 0:
            chunks += self._own_buffers() + (self.whole_buffers() if self.groups.grid.tp_rank == 0 else [])
        return chunks

    def optimizer_chunks(self, optimizer: torch.optim.Optimizer) -> list[Chunk]:
        """Return the chunks into which this rank's master copies and moments are loaded."""
        chunks: list[Chunk] = []
        for name, parameter in named_parameters(self.stage.transformer):
            chunks += self._piece_chunks(name, parameter, piece_of(parameter, optimizer, self.groups))
        return chunks

    def weight_chunks(self) -> list[Chunk]:
        """Return the chunks into which this rank's weights are loaded; ZeRO-3's are copied from masters instead."""
        chunks: list[Chunk] = []
        for name, parameter in named_parameters(self.stage.transformer):
            if not is_partitioned(parameter):
                chunks += self._range_chunks("model", name, parameter, 0, parameter.detach().view(-1))
        return chunks

    def whole_buffers(self) -> list[Chunk]:
        """Return the chunks of buffers that are the same on all ranks."""
        return [whole_chunk(f"buffer.{name}", buffer) for name, buffer in self.buffers(of_shards=False)]

    def buffer_chunks(self, saved_names: Container[str]) -> list[Chunk]:
        """Return the chunks for power-iteration vectors; none if another tensor-parallel size saved the checkpoint."""
        chunks = self._own_buffers()
        return chunks if all(chunk.name in saved_names for chunk in chunks) else []

    def _piece_chunks(self, name: str, parameter: nn.Parameter, piece: Piece | None) -> Iterator[Chunk]:
        if piece is not None:
            for kind, flat in piece.tensors().items():
                yield from self._range_chunks(kind, name, parameter, piece.start, flat)

    def _range_chunks(self, kind: str, name: str, parameter: nn.Parameter, start: int, flat: Tensor) -> Iterator[Chunk]:
        name, shape, dim = source(name, self.stage), whole_shape(parameter), parameter.partition_dim
        offsets = [0] * len(shape)
        if dim is not None:
            offsets[dim] = shape[dim] * self.groups.grid.tp_rank
        return chunks_of_range(f"{kind}.{name}", self._shapes[name], shape, offsets, start, flat.detach())

    def _own_buffers(self) -> list[Chunk]:
        prefix = f"buffer.tp{self.groups.grid.tp_rank}of{self.groups.grid.tp}"
        return [whole_chunk(f"{prefix}.{name}", buffer) for name, buffer in self.buffers(of_shards=True)]

    def buffers(self, of_shards: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield power-iteration vectors, which belong to a shard of a weight, or all other buffers."""
        for name, buffer in self.stage.transformer.named_buffers():
            if is_of_shard(name) == of_shards:
                yield name, buffer

    def _saved_elsewhere(self, name: str, parameter: nn.Parameter) -> bool:
        replicated = parameter.partition_dim is None and self.groups.grid.tp_rank != 0
        return replicated or source(name, self.stage) != name


class SavedState(Protocol):
    """What loading needs of a checkpoint.

    Attributes:
        adam_step: optimizer steps taken.
        names: of the saved tensors.
    """

    adam_step: float
    names: Container[str]

    def read(self, chunks: list[Chunk]) -> None:
        """Fill the chunks; all ranks call."""


@torch.no_grad()
def load_training_state(stage: nn.Module, wrapper: Any, groups: Groups, saved: SavedState, vocab_size: int) -> None:
    """Load weights, master copies and moments that any layout saved.

    Args:
        stage: of this rank.
        wrapper: DeepSpeed's optimizer around AdamW.
        groups: of this rank.
        saved: the checkpoint.
        vocab_size: without padding.
    """
    create_moments(wrapper, saved.adam_step)
    state = StateMap(stage, groups, vocab_size)
    targets = state.optimizer_chunks(adam(wrapper)) + state.weight_chunks()
    _load(stage, state, saved, targets)
    for _, parameter in named_parameters(stage.transformer):
        piece = piece_of(parameter, adam(wrapper), groups) if is_partitioned(parameter) else None
        if piece is not None:
            partition(parameter).values[: piece.master.numel()].copy_(piece.master)


@torch.no_grad()
def load_weights(stage: nn.Module, groups: Groups, saved: SavedState, vocab_size: int) -> None:
    """Load a stage's weights that any layout saved; not under ZeRO-3, which partitions them."""
    state = StateMap(stage, groups, vocab_size)
    _load(stage, state, saved, state.weight_chunks())


def _load(stage: nn.Module, state: StateMap, saved: SavedState, targets: list[Chunk]) -> None:
    """Read the targets and the power-iteration vectors; recompute these vectors if another layout saved them."""
    buffers = state.buffer_chunks(saved.names)
    saved.read(targets + buffers + state.whole_buffers())
    if not buffers:
        start_spectral_norms(stage)


def piece_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, groups: Groups) -> Piece | None:
    """Return this data-parallel rank's piece of a parameter, or None if it holds none."""
    if is_partitioned(parameter):
        return _piece_of_stage_3(parameter, groups)
    held = fragment(parameter)
    if held is None:
        return None
    flat = optimizer.param_groups[held.group]["params"][0]
    moments = {kind: optimizer.state[flat][kind].narrow(0, held.flat_start, held.size) for kind in MOMENTS}
    return Piece(held.start, held.master, moments)


def _piece_of_stage_3(parameter: nn.Parameter, groups: Groups) -> Piece | None:
    held = partition(parameter)
    start = groups.grid.replica * held.size
    length = min(held.size, held.whole - start)
    if length <= 0:
        return None
    moments = {kind: partition_state(parameter, kind)[:length] for kind in MOMENTS}
    return Piece(start, partition_state(parameter, None)[:length], moments)


def create_moments(wrapper: Any, adam_step: float) -> None:
    """Create Adam's state of every flat master copy, which torch would create at its first step.

    Args:
        wrapper: DeepSpeed's optimizer around AdamW.
        adam_step: optimizer steps taken.
    """
    optimizer = adam(wrapper)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for flat in flat_masters(wrapper):
        state = optimizer.state[flat]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32, device=flat.device if on_device else "cpu")


def adam_step(optimizer: torch.optim.Optimizer) -> float:
    """Return the optimizer steps taken, as Adam's bias correction counts them."""
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(steps, default=0.0)


def source(name: str, stage: nn.Module) -> str:
    """Return the name under which a parameter is saved; a tied head's second copy is saved as the embedding."""
    return TIED_HEAD_SOURCE if name == "head.weight" and stage.transformer.config.tied_head else name
