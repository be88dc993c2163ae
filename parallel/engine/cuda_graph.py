"""Replay a stage's training pass as two CUDA graphs, forward and backward.

The host then launches two graphs instead of about eight hundred kernels. A replay runs kernels only: no Python runs,
addresses stay the same, and each replay overwrites the last one's results. So a pass is captured as a function of
tensors, from a micro-batch to its loss and its statistics. Whatever changes between steps stays outside: the engine
accumulates and reduces gradients as usual, and the optimizer has learning rates and limits.

All gradients arrive when the replay ends, and the weights must be there when it begins. So nothing of their exchange is
hidden (`ParallelConfig.replays_passes` weighs that).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.sharding.stage import Stage, StageStatistics

Capture = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]


class CaptureError(RuntimeError):
    """A training pass does something that a CUDA graph cannot hold; the message is one line."""


class _TrainingPass(nn.Module):
    """A stage's forward pass as a function of tensors: returns the loss, the entropies, and each scalar of `names`."""

    def __init__(self, stage: Stage, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stage, self._forward = stage, forward
        self._loss: Tensor | None = None
        self.names: tuple[str, ...] = ()

    def forward(self, *micro_batch: Tensor) -> tuple[Tensor, ...]:
        self.release_graph()
        so_far, self.stage.statistics = self.stage.statistics, None
        self._loss = self._forward(*micro_batch)
        measured, self.stage.statistics = self.stage.take_statistics(), so_far
        self.names = tuple(measured.sums)
        return self._loss, measured.entropy_LN, *measured.sums.values()

    def release_graph(self) -> None:
        """Release the last pass's autograd graph, which the capturing code keeps alive.

        Later passes would otherwise share its gradient nodes, which belong to the capture's stream.
        """
        if self._loss is not None:
            self._loss.detach_()


def _explained(error: RuntimeError) -> RuntimeError:
    """Return a CaptureError for a refused capture, and any other error unchanged."""
    ended = isinstance(error.__context__, RuntimeError) and "during capture" in str(error)
    cause = error.__context__ if ended else error  # the error of the ended capture hides what ended it
    assert isinstance(cause, RuntimeError)
    if isinstance(cause, torch.OutOfMemoryError) or "captur" not in f"{cause} {error}":
        return cause
    first_line = str(cause).partition("\n")[0]
    return CaptureError(
        f"the training pass cannot be captured as CUDA graphs ({first_line}); set training.cuda_graphs=off"
    )


def replay_training_passes(stage: Stage, capture: Capture = torch.cuda.make_graphed_callables) -> None:
    """Make `stage` capture its first training pass and replay it from then on; evaluation runs as before.

    Each shape of micro-batches is captured once. A pass must run backward before the next one runs forward, and what it
    exchanges with other ranks must end within it.

    Args:
        stage: on a GPU.
        capture: takes a module and example inputs, and returns a callable that replays it.

    Raises (from the pass that is captured):
        CaptureError: the pass cannot be captured, for example because it waits for the device.
    """
    eager = stage.forward
    captured: dict[tuple[torch.Size, ...], tuple[_TrainingPass, Callable[..., tuple[Tensor, ...]]]] = {}

    def forward(*micro_batch: Tensor) -> Tensor:
        if not stage.training:
            return eager(*micro_batch)
        shapes = tuple(each.shape for each in micro_batch)
        if shapes not in captured:
            one = _TrainingPass(stage, eager)
            static = tuple(each.clone() for each in micro_batch)  # replays overwrite it
            try:
                captured[shapes] = one, capture(one, static)
            except RuntimeError as error:
                raise _explained(error) from None
            one.release_graph()
        one, replay = captured[shapes]
        loss, *measured = replay(*micro_batch)
        entropy_LN, *scalars = (each.detach().clone() for each in measured)
        sums = dict(zip(one.names, scalars, strict=True))
        stage.count(StageStatistics(1, micro_batch[0].shape[1], entropy_LN, sums))
        return loss

    stage.forward = forward  # type: ignore[method-assign,assignment]
