"""Write tensors as safetensors files, one after the other, so that only one file's worth of them is ever in memory.

The format is 8 bytes of length, a table in JSON, and the values row by row in little-endian order.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from data.files.own import write_atomically
from data.files.strict_json import to_json

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write model.safetensors, or several files with an index if there are more than `shard_bytes` bytes.

    Args:
        folder: to write to.
        tensors: names and values, float32 or bfloat16.
        shard_bytes: a tensor that would make a file larger begins a new one.

    Returns:
        How many values were written.

    Raises:
        OSError: a file cannot be written.
    """
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    total_bytes = values = 0

    def flush() -> None:
        files.append(folder / f"{len(files)}.part")
        _write(files[-1], shard)
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(map(_size, shard.values())) + _size(tensor) > shard_bytes:
            flush()
        shard[name] = tensor.detach().contiguous()
        weight_map[name] = len(files)
        total_bytes, values = total_bytes + _size(tensor), values + tensor.numel()
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return values
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[number] for name, number in weight_map.items()},
    }
    write_atomically(folder / INDEX, to_json(index, indent=1) + "\n")
    return values


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write(file: Path, shard: dict[str, Tensor]) -> None:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        start, end = end, end + _size(tensor)
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = to_json(table).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "xb") as output:
        output.write(struct.pack("<Q", len(header)) + header)
        for tensor in shard.values():
            output.write(tensor.flatten().view(torch.uint8).numpy())
