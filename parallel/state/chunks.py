"""Rectangles of whole tensors, and the planners that let torch.distributed.checkpoint save and load them.

What a rank holds of a parameter [rows, columns] is a tensor-parallel shard of it, and ZeRO cuts the flattened shard
once more. A contiguous range of a flattened matrix is up to three rectangles; here are elements 3 to 13 of a [4, 4]
shard that starts at row 4 of the whole:

    . . . 1        row 4, column 3    1 x 1
    2 2 2 2        row 5, column 0    2 x 4
    2 2 2 2
    3 3 . .        row 7, column 0    1 x 2

Rectangles are what torch.distributed.checkpoint knows: it works out which part of which saved rectangle goes into which
rectangle wanted, whatever layout saved and whatever layout loads.
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
    """A rectangle of the tensor `name` of shape `whole`, from `offsets` on; `tensor` holds its values or takes them."""

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
    """A tensor that is not cut."""
    return Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def chunks_of_range(
    name: str,
    whole: Sequence[int],
    shard_shape: Sequence[int],
    shard_offsets: Sequence[int],
    start: int,
    flat: Tensor,
) -> Iterator[Chunk]:
    """The rectangles of `flat`, elements `start` onwards of a flattened shard; rows beyond the whole are left out.

    Args:
        whole: shape of the whole tensor, of one or two dimensions.
        shard_shape, shard_offsets: the shard's shape and place in the whole; it may reach beyond (vocabulary padding).
        flat: [length], views of it are returned.
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
    """Saves the chunks of all ranks, which together cover every tensor once; anything else fails the plan."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {chunk.index: chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(chunk) for chunk in self._chunks.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._chunks[index].tensor


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Fills chunks from a checkpoint of any layout.

    Raises (from torch.distributed.checkpoint, as the cause of a CheckpointException):
        ValueError: a tensor is not in the checkpoint, has another shape there, or is not there in full.
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
