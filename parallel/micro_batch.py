"""What a micro-batch is: the tensors of one forward pass on one rank, from rows of tokens to the device."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a token that does not count in the cross-entropy."""


class MicroBatch(NamedTuple):
    """One rank's share of a micro-batch, on the device.

    Attributes:
        tokens_TB: [T / cp, B] int64.
        labels_TB: the next token of each, [T / cp, B] int64; `IGNORED_LABEL` where it does not count.
        document_start_BT: for attention within documents, the position at which each token's document begins,
            [B, T] over the whole sequence. None if a token attends to everything before it.
    """

    tokens_TB: Tensor
    labels_TB: Tensor
    document_start_BT: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are there, in the order of a stage's arguments."""
        return tuple(tensor for tensor in self if tensor is not None)

    @property
    def sequences(self) -> int:
        return self.tokens_TB.shape[1]


def micro_batch(
    rows_BT: Tensor, positions: range, document_start_BT: Tensor | None = None, valid_rows: int | None = None
) -> MicroBatch:
    """Cut rows of tokens into the inputs and labels that one rank of a context-parallel group works on.

    Args:
        rows_BT: [B, T + 1] int64 on the device: each row holds T inputs and, one further, T labels.
        positions: inputs that this rank holds.
        document_start_BT: [B, T] on the device, or None.
        valid_rows: how many of the first rows count; None means all. Labels of the others are ignored.
    """
    labels_BT = rows_BT[:, 1:]
    if valid_rows is not None and valid_rows < rows_BT.shape[0]:
        labels_BT = labels_BT.clone()
        labels_BT[valid_rows:] = IGNORED_LABEL
    held = slice(positions.start, positions.stop)
    return MicroBatch(rows_BT[:, held].t().contiguous(), labels_BT[:, held].t().contiguous(), document_start_BT)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to the device without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
