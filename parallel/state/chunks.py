"""Rectangles of whole tensors, and planners that let torch.distributed.checkpoint save and load them.

A rank holds a tensor-parallel shard of a parameter [rows, columns], and ZeRO cuts the flattened shard once more. A
contiguous range of a flattened matrix consists of up to three rectangles. Here are elements 3 to 13 of a [4, 4] shard
that starts at row 4 of the whole:

    . . . 1        row 4, column 3    1 x 1
    2 2 2 2        row 5, column 0    2 x 4
    2 2 2 2
    3 3 . .        row 7, column 0    1 x 2

torch.distributed.checkpoint works with rectangles: it finds which part of which saved rectangle belongs into which
wanted one. So any layout can load what any other layout saved.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a whole tensor.

    Attributes:
        name: of the whole tensor.
        whole: shape of the whole tensor.
        offsets: where in it the rectangle begins.
        tensor: the values to save, or the memory to load them into.
    """

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offsets)

    @property
    def metadata(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def whole_chunk(name: str, tensor: Tensor) -> Chunk:
    """Return a chunk that is a whole tensor."""
    return Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def chunks_of_range(
    name: str,
    whole: Sequence[int],
    shard_shape: Sequence[int],
    shard_offsets: Sequence[int],
    start: int,
    flat: Tensor,
) -> Iterator[Chunk]:
    """Yield the rectangles of a contiguous range of a flattened shard, without rows beyond the whole.

    Args:
        name: of the whole tensor.
        whole: its shape, of one or two dimensions.
        shard_shape: shape of the shard, which may reach beyond the whole (vocabulary padding).
        shard_offsets: where in the whole the shard begins.
        start: the range's first element in the flattened shard.
        flat: the range's values, [length]; the chunks hold views of it.
    """
    assert 1 <= len(whole) <= 2, (name, tuple(whole))
    columns = shard_shape[1] if len(whole) == 2 else 1
    rows = max(0, min(shard_shape[0], whole[0] - shard_offsets[0]))
    stop = min(start + flat.numel(), rows * columns)
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        whole_rows = (stop - position) // columns if column == 0 else 0
        size = (whole_rows, columns) if whole_rows else (1, min(columns - column, stop - position))
        length = size[0] * size[1]
        place = (shard_offsets[0] + row, *([shard_offsets[1] + column] if len(whole) == 2 else []))
        values = flat[position - start : position - start + length].view(size[: len(whole)])
        yield Chunk(name, tuple(whole), place, values)
        position += length


class ChunkSavePlanner(DefaultSavePlanner):
    """Saves the chunks of all ranks, which together must cover every tensor exactly once."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {chunk.index: chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(chunk) for chunk in self._chunks.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._chunks[index].tensor


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Fills chunks from a checkpoint that any layout saved.

    Raises (as the cause of torch.distributed.checkpoint's CheckpointException):
        ValueError: a tensor is missing from the checkpoint, has another shape there, or is incomplete.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.name, []).append(chunk)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, chunks in self._chunks.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{name} is not in the checkpoint")
            if tuple(saved.size) != chunks[0].whole:
                raise ValueError(f"{name} was saved with shape {tuple(saved.size)}, expected {chunks[0].whole}")
            reads = create_read_items_for_chunk_list(name, saved, [chunk.metadata for chunk in chunks])
            found, wanted = sum(math.prod(r.lengths) for r in reads), sum(chunk.tensor.numel() for chunk in chunks)
            if found != wanted:
                raise ValueError(f"{name}: {found} of {wanted} values are in the checkpoint")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None
        return self._chunks[index.fqn][index.index].tensor


def _write_item(chunk: Chunk) -> WriteItem:
    properties = TensorProperties(dtype=chunk.tensor.dtype)
    data = TensorWriteData(chunk=chunk.metadata, properties=properties, size=torch.Size(chunk.whole))
    return WriteItem(index=chunk.index, type=WriteItemType.SHARD, tensor_data=data)


def is_of_shard(buffer: str) -> bool:
    """Return whether a buffer belongs to a shard of a weight, so that each tensor-parallel size has its own."""
    return ".parametrizations." in buffer
