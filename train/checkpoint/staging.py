"""Host memory that a checkpoint is copied to, so that training goes on while it is written.

On a GPU the memory is page-locked, once and in the background of the first steps, since locking takes seconds and
copying into it runs at the speed of the bus.
"""

import dataclasses

import torch

from parallel.state.chunks import Chunk


class Staging:
    """Room for this rank's chunks; the layout of a run never changes.

    Args:
        chunks: as they will be copied; only their sizes count here.
    """

    def __init__(self, chunks: list[Chunk]) -> None:
        self._devices = {chunk.tensor.device for chunk in chunks if chunk.tensor.is_cuda}
        self._memory = torch.empty(sum(_padded_bytes(chunk) for chunk in chunks), dtype=torch.uint8).fill_(0)  # touched
        self._locked = all(_lock(self._memory, device) for device in self._devices) and bool(self._devices)

    def copy(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks with their values in host memory; overwrites what was copied before."""
        copies, start = [], 0
        for chunk in chunks:
            room = self._memory[start : start + chunk.tensor.nbytes]
            values = room.view(chunk.tensor.dtype).view(chunk.tensor.shape)
            values.copy_(chunk.tensor, non_blocking=True)
            copies.append(dataclasses.replace(chunk, tensor=values))
            start += _padded_bytes(chunk)
        for device in self._devices:
            torch.cuda.synchronize(device)
        return copies

    def close(self) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False


def _padded_bytes(chunk: Chunk) -> int:
    return -(-chunk.tensor.nbytes // 16) * 16


def _lock(memory: torch.Tensor, device: torch.device) -> bool:
    """Page-locks memory; False where the system does not allow so much, which costs speed only."""
    with torch.cuda.device(device):  # a new thread begins on the first device, which may be another rank's
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
