"""A training pass through a stage as two CUDA graphs, forward and backward, so that the host launches two things where
it launched some eight hundred.

What a graph replays is kernels: no Python runs, addresses stay what they were, and results of the last replay are
overwritten. So a pass is captured as a function of tensors alone, from a micro-batch to its loss and what it measured,
and everything that changes from step to step stays outside: gradients are taken up, reduced and used by the engine as
ever, rates and limits are the optimizer's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.sharding.stage import Stage, StageStatistics

Capture = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]


class CaptureError(RuntimeError):
    """A training pass does something that a graph cannot hold; one clear line."""


class _TrainingPass(nn.Module):
    """A stage's forward pass that returns tensors only: the loss, the entropies, and each scalar of `names`."""

    def __init__(self, stage: Stage, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stage, self._forward = stage, forward
        self._loss: Tensor | None = None
        self.names: tuple[str, ...] = ()

    def forward(self, *micro_batch: Tensor) -> tuple[Tensor, ...]:
        self.let_go()
        so_far, self.stage.statistics = self.stage.statistics, None
        self._loss = self._forward(*micro_batch)
        measured, self.stage.statistics = self.stage.take_statistics(), so_far
        self.names = tuple(measured.sums)
        return self._loss, measured.entropy_LN, *measured.sums.values()

    def let_go(self) -> None:
        """Ends the last pass's autograd graph, which whoever captured it holds on to: its gradient nodes would be those
        of every later pass too, and belong to the stream that it was captured on.
        """
        if self._loss is not None:
            self._loss.detach_()


def _explained(error: RuntimeError) -> RuntimeError:
    """A CaptureError in place of what a refused capture raises; anything else as it is."""
    ended = isinstance(error.__context__, RuntimeError) and "during capture" in str(error)
    cause = error.__context__ if ended else error  # how a capture ended hides what ended it
    assert isinstance(cause, RuntimeError)
    if isinstance(cause, torch.OutOfMemoryError) or "captur" not in f"{cause} {error}":
        return cause
    first_line = str(cause).partition("\n")[0]
    return CaptureError(
        f"the training pass cannot be captured as CUDA graphs ({first_line}); set training.cuda_graphs=off"
    )


def replay_training_passes(stage: Stage, capture: Capture = torch.cuda.make_graphed_callables) -> None:
    """Lets `stage` capture its first training pass and replay it for every further one; evaluation runs as before.

    Micro-batches of other shapes are captured once more. A pass must have run backward before the next runs forward,
    and must not communicate.

    Raises, from the pass that is captured:
        CaptureError: it waits for the device, for instance.
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
            one.let_go()
        one, replay = captured[shapes]
        loss, *measured = replay(*micro_batch)
        entropy_LN, *scalars = (each.detach().clone() for each in measured)
        sums = dict(zip(one.names, scalars, strict=True))
        stage.count(StageStatistics(1, micro_batch[0].shape[1], entropy_LN, sums))
        return loss

    stage.forward = forward  # type: ignore[method-assign,assignment]
