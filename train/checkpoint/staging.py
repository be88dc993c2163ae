"""Host memory that a checkpoint is copied to, so that training goes on while it is written.

With a GPU the memory is page-locked, so that copies run at the speed of the bus. Locking takes seconds, so it is done
once, in the background of the first steps.
"""

import dataclasses

import torch

from parallel.state.chunks import Chunk


class Staging:
    """Host memory for this rank's chunks, whose sizes stay the same for the whole run.

    Args:
        chunks: like those that will be copied; only their sizes and devices count here.
    """

    def __init__(self, chunks: list[Chunk]) -> None:
        self._devices = {chunk.tensor.device for chunk in chunks if chunk.tensor.is_cuda}
        self._memory = torch.empty(sum(_padded_bytes(chunk) for chunk in chunks), dtype=torch.uint8).fill_(0)  # touched
        self._locked = all(_lock(self._memory, device) for device in self._devices) and bool(self._devices)

    def copy(self, chunks: list[Chunk]) -> list[Chunk]:
        """Copy the chunks to host memory, over what was copied before; wait until the copies are done."""
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
        """Unlock the memory."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False


def _padded_bytes(chunk: Chunk) -> int:
    return -(-chunk.tensor.nbytes // 16) * 16


def _lock(memory: torch.Tensor, device: torch.device) -> bool:
    """Page-lock memory; return False if the system does not allow so much, which costs speed only."""
    with torch.cuda.device(device):  # a new thread starts on the first device, which may be another rank's
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
