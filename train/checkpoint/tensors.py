"""The file format of a checkpoint's tensors: plain values, and a table of them in JSON.

    rank_00000_000.bin    the rectangles that rank 0 saved, one after the other, row by row in little-endian order
    tensors.json          name -> dtype, shape, and for every rectangle its place in which file

torch.distributed.checkpoint's own format pickles its table and every tensor. Reading this one cannot run any code.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data.files.strict_json import parse_json, to_json
from train.checkpoint.folder import FORMAT, TENSORS, DamagedFileError, Folder, write_marker

FILE_BYTES = 1 << 30
READING_THREADS = 4
"""Files that a rank reads at a time."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a rectangle's values lie."""

    file: str
    offset: int


class Writer(StorageWriter):
    """Writes a checkpoint into a folder, for torch.distributed.checkpoint.

    Args:
        folder: of the checkpoint.
        rank: which appears in the names of this rank's files.
        description: what the marker is to hold besides the table of files.
        begin: makes the folder ready (OwnedRoot.begin); called on the coordinator, rank 0, alone.
    """

    def __init__(self, folder: Folder, rank: int, description: dict[str, Any], begin: Callable[[], None]) -> None:
        self._folder, self._rank, self._description, self._begin = folder, rank, description, begin

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder ready; no rank writes before the coordinator's plan has reached it."""
        if is_coordinator:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_by_size(plan)):
            name = f"rank_{self._rank:05d}_{number:03d}.bin"
            places = []
            with self._folder.writing(name) as file:
                for item in items:
                    offset = file.num_bytes
                    file.write(_bytes_of(planner.resolve_data(item)))
                    places.append((item.index, Place(name, offset), file.num_bytes - offset))
            digest = {name: file.digest}
            results += [WriteResult(index, size, (place, digest)) for index, place, size in places]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data[0] for of_rank in results for result in of_rank}
        files: dict[str, Any] = {}
        for of_rank in results:
            for result in of_rank:
                files.update(result.storage_data[1])
        with self._folder.writing(TENSORS) as file:
            file.write(to_json(_table(metadata, places)).encode())
        files[TENSORS] = file.digest
        write_marker(self._folder, {**self._description, "format": FORMAT, "files": files})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads a checkpoint from a folder; of each rectangle it reads only the rows that are wanted."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            try:
                self._metadata = _metadata(parse_json(self._folder.read(TENSORS)))
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
                raise DamagedFileError(f"{self._folder.describe(TENSORS)}: damaged ({error})") from None
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        metadata = self.read_metadata()
        by_file: dict[str, list[tuple[int, ReadItem]]] = {}
        for item in plan.items:
            place = metadata.storage_data[item.storage_index]
            by_file.setdefault(place.file, []).append((place.offset, item))

        @torch.no_grad()  # which holds for one thread
        def read(name: str) -> None:
            with self._folder.reading(name) as file:
                for offset, item in sorted(by_file[name], key=lambda pair: pair[0]):
                    saved = metadata.state_dict_metadata[item.storage_index.fqn]
                    values = _read_rectangle(file, offset, item, saved)
                    planner.resolve_tensor(item).copy_(values)

        with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read") as threads:
            list(threads.map(read, by_file))
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _read_rectangle(file: BinaryIO, offset: int, item: ReadItem, saved: Any) -> Tensor:
    """Read the wanted part of a saved rectangle: whole rows, then columns are cut from them."""
    chunk = next(c for c in _hinted(saved.chunks, item.storage_index.index) if c.offsets == item.storage_index.offset)
    row_values = math.prod(chunk.sizes[1:])
    row_bytes = row_values * saved.properties.dtype.itemsize
    first, rows = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, 1)
    file.seek(offset + first * row_bytes)
    content = bytearray(file.read(rows * row_bytes))
    if len(content) != rows * row_bytes:
        raise DamagedFileError(f"{item.storage_index.fqn}: its file ends before its values do")
    values = torch.frombuffer(content, dtype=saved.properties.dtype).view(rows, *chunk.sizes[1:])
    for dim in range(1, len(chunk.sizes)):
        values = values.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    return values


def _hinted(chunks: list[ChunkStorageMetadata], index: int | None) -> list[ChunkStorageMetadata]:
    return chunks if index is None or index >= len(chunks) else [chunks[index], *chunks]


def _by_size(plan: SavePlan) -> Iterator[list[Any]]:
    """Group items into files of about FILE_BYTES each, so that several ranks can check hashes at once."""
    group: list[Any] = []
    size = 0
    for item in plan.items:
        group.append(item)
        size += math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes_of(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _table(metadata: Metadata, places: dict[MetadataIndex, Place]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(saved.properties.dtype).removeprefix("torch."),
            "shape": list(saved.size),
            "chunks": [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    **asdict(places[MetadataIndex(name, chunk.offsets)]),
                }
                for chunk in saved.chunks
            ],
        }
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }


def _metadata(table: dict[str, Any]) -> Metadata:
    tensors: dict[str, Any] = {}
    places = {}
    for name, entry in table.items():
        chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
        for chunk, c in zip(chunks, entry["chunks"], strict=True):
            if "/" in c["file"]:
                raise ValueError(f"{c['file']!r} is no plain file name")
            places[MetadataIndex(name, chunk.offsets)] = Place(str(c["file"]), int(c["offset"]))
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(state_dict_metadata=tensors, storage_data=places)


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
